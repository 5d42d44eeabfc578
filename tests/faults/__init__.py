"""Processes that are killed and disks that are full, at any call that changes a folder."""
