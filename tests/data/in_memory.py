"""Rows of records that are held in memory, as the program makes them."""

from dpgemma.data.formats import refuse
from dpgemma.data.text import units
from dpgemma.data.text.pieces import InMemoryPieces, of_records


def rows_in_memory(records, tokenizer, reading, on_bad=refuse):
    return units.in_memory(InMemoryPieces(list(of_records(records, tokenizer, reading, on_bad))), tokenizer, reading)
