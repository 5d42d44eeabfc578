"""Runs that lie in an object storage: a server of S3's interface on this computer."""

import contextlib
import functools
import gzip
import http.server
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time

import pytest

from accounting import run_files
from accounting.errors import InputError
from dpgemma.data import readers
from dpgemma.data.text import caching
from dpgemma.data.text.pieces import Reading
from dpgemma.storage import mirror as mirror_lib
from dpgemma.storage.mirror import Mirror
from dpgemma.storage.objects import Objects
from dpgemma.training.prepare import prepare
from dpgemma.training.settings import Settings
from tests import object_storage
from tests.data.cache_test import Silent
from tests.training import runs


@pytest.fixture(scope="module")
def server():
    with object_storage.served() as running:
        yield running


@pytest.fixture
def variables(server, tmp_path):
    return object_storage.machine(server, tmp_path / "cache")


@pytest.fixture
def address(variables, monkeypatch):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    return f"s3://{object_storage.new_bucket()}/runs/one"


def lines(address):
    """The ledger's lines, as the storage has them one by one."""
    objects = Objects(address)
    contents = objects.read(objects.names("ledger.d"))
    return [json.loads(contents[name].decode().split("\n")[0]) for name in sorted(contents)]


def audited(address):
    done = runs.call("audit", address, "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout)


@pytest.mark.slow
def test_a_run_is_trained_sampled_exported_and_audited_where_it_lies(text, address, tmp_path):
    done = runs.call(*runs.flags(text, address, steps=4, keep_checkpoints=1))
    assert done.returncode == 0, done.stderr
    objects, ledger = Objects(address), lines(address)
    names = objects.names()
    assert [line["step"] for line in ledger if line["kind"] == "step"] == [0, 1, 2, 3]
    published = objects.read([run_files.LEDGER])[run_files.LEDGER].decode()
    assert [json.loads(line) for line in published.splitlines()] == ledger
    assert {run_files.CONFIG, run_files.KEYS, run_files.REPORT, run_files.PAGE, run_files.METRICS} < set(names)
    checkpoints = {name.split("/")[1] for name in names if name.startswith("checkpoints/")}
    assert checkpoints == {"4", "4.complete"} and "lock" not in names
    assert audited(address)["consistent"]
    # The copy, which has the keys, is gone.
    assert not [*(tmp_path / "cache" / "dpgemma" / "copies").iterdir()]
    done = runs.call("sample", f"--workdir={address}", "--max_new_tokens=3")
    assert done.returncode == 0, done.stderr
    done = runs.call("export", f"--workdir={address}", f"--out={tmp_path / 'exported'}")
    assert done.returncode == 0, done.stderr
    assert lines(address)[-2]["kind"] == "export" and audited(address)["consistent"]
    done = runs.call("audit", address, f"--export={tmp_path / 'exported'}")
    assert done.returncode == 0, done.stdout
    # The same command finds nothing left to do.
    done = runs.call(*runs.flags(text, address, steps=4, keep_checkpoints=1))
    assert done.returncode == 0 and len([line for line in lines(address) if line["kind"] == "step"]) == 4


def test_a_line_is_in_the_storage_before_its_step_is_computed(text, address):
    settings = runs.SETTINGS | dict(data=str(text), steps=3, checkpoint_every=2)
    trainer = prepare(Settings(**settings), address)
    compute, known = trainer.dp_step, []

    class Watched:
        noiser = compute.noiser

        def compiled(self, *arguments):
            self.step = compute.compiled(*arguments)
            self.memory = self.step.memory
            return self

        def __call__(self, *arguments):
            known.append([line["step"] for line in lines(address) if line["kind"] == "step"])
            return self.step(*arguments)

    trainer.dp_step = Watched()
    try:
        trainer.train()
    finally:
        trainer.run.unlock()
    assert known == [[0], [0, 1], [0, 1, 2]]


def test_of_two_processes_that_write_the_same_line_one_ends(address, tmp_path):
    first, second = (Mirror(address, tmp_path / name, patience_seconds=0.1) for name in ("a", "b"))
    try:
        first.add_line(0, "text")
        first.add_line(0, "text")  # an answer was lost, and the same is asked again
        with pytest.raises(InputError, match=r"another process has gone on with the run in s3://.*: this one ends"):
            second.add_line(0, "text")
        second.add_line(1, "text")
        with pytest.raises(InputError, match="another process has gone on"):
            first.add_line(1, "text")
    finally:
        first.close()
        assert Objects(address).read(["lock"])["lock"].startswith(second._name.encode()), "it has taken the lock over"
        second.close()
    assert "lock" not in Objects(address).names()


def test_a_run_that_is_being_trained_is_refused_to_others(address, tmp_path):
    held = Mirror(address, tmp_path / "copies", beat_seconds=0.2)
    try:
        with pytest.raises(InputError, match=r"another process is training in s3://.*: wait for it, or choose another"):
            Mirror(address, tmp_path / "others")
        assert mirror_lib.is_held(Objects(address))
    finally:
        held.close()
    Mirror(address, tmp_path / "others").close()


def written(mirror, *steps):
    """Gives a copy the checkpoints of these steps, and those alone."""
    shutil.rmtree(mirror.folder / "checkpoints", ignore_errors=True)
    for step in steps:
        (mirror.folder / "checkpoints" / str(step)).mkdir(parents=True)
        (mirror.folder / "checkpoints" / str(step) / "part").write_text(mirror.folder.name)
    mirror.stored(steps[-1])
    mirror.wait()


def stored(address):
    return [name.removeprefix("checkpoints/") for name in Objects(address).names("checkpoints")]


def test_a_process_that_lost_its_run_takes_nothing_from_its_successor(address, tmp_path):
    first = Mirror(address, tmp_path / "a", beat_seconds=60)
    written(first, 2)
    second = Mirror(address, tmp_path / "b", patience_seconds=0.1)
    try:
        written(second, 4)
        for lost in (lambda: written(first, 6), first.publish):
            with pytest.raises(InputError, match="another process has gone on with the run"):
                lost()
        assert stored(address) == ["2.complete", "2/part", "4.complete", "4/part"]
    finally:
        first.close()
        second.close()


def test_what_a_broken_attempt_left_is_no_part_of_a_checkpoint(address, tmp_path):
    mirror = Mirror(address, tmp_path / "copies")
    try:
        Objects(address).write("checkpoints/2/old", b"")
        written(mirror, 2)
        assert stored(address) == ["2.complete", "2/part"]
        written(mirror, 4)
        assert stored(address) == ["4.complete", "4/part"]
    finally:
        mirror.close()


def test_copies_of_dead_processes_are_removed(address, tmp_path):
    copies = tmp_path / "copies"
    (copies / "run-dead" / "private").mkdir(parents=True)
    (copies / "run-dead" / "private" / "keys.json").write_text("secret")
    (copies / "run-dead.held").write_text("")
    alive = Mirror(address, copies)
    alive.folder.mkdir()
    other = Mirror(address.replace("one", "two"), copies)
    assert alive.folder.is_dir() and not (copies / "run-dead").exists()
    other.close()
    alive.close()
    assert not [*copies.iterdir()]


def test_empty_objects_that_mark_folders_are_no_files(address, tmp_path):
    objects = Objects(address)
    objects.write("", b"")
    objects.write("private/", b"")
    assert objects.names() == []
    Mirror(address, tmp_path / "copies").close()


def test_what_cannot_be_used_is_refused_with_a_sentence(text, address, variables, tmp_path):
    bucket = address.partition("/runs")[0]
    Objects(f"{bucket}/other").write("notes.txt", b"not a run")
    Objects(f"{bucket}/lost").write("ledger.d/000000000000", b"{}\nx\n")
    refused = {
        f"{bucket}/a*": "without any of * ? [ ] :",
        f"{bucket}/other": "is neither empty nor the folder of a run: choose another --workdir",
        f"{bucket}/lost": "is a run without its keys (private/keys.json): it ended before its first step; remove it",
        "s3://no-such-bucket-anywhere/run": "check that the bucket exists, that you may read and write it",
        bucket: "is no folder that can be used: give one on a disk, or gs://BUCKET/FOLDER or s3://",
        "ftp://machine/run": "is no folder that can be used",
    }
    for place, sentence in refused.items():
        done = runs.call(*runs.flags(text, place))
        assert done.returncode == 2 and sentence in done.stderr and "Traceback" not in done.stderr, done.stderr
    for command in (["audit", f"{bucket}/none"], ["sample", f"--workdir={bucket}/none"]):
        done = runs.call(*command)
        assert done.returncode == 2 and "is no run: it has no ledger" in done.stderr


def test_a_storage_whose_package_is_not_installed_says_so(tmp_path):
    code = (
        "import sys; sys.modules['gcsfs'] = None\n"
        "from dpgemma.storage.objects import Objects\nObjects('gs://bucket/run')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert "InputError: gs://bucket/run needs another package: pip install 'dpgemma[gcs]'" in done.stderr


@contextlib.contextmanager
def google_storage(refuses):
    """The address of a server of Google's interface: an emulator, to which what the service says of generations of
    objects is added here.

    Args:
      refuses: whether an object is written only if its generation is the one that the writer asks for.
    """
    emulator = pytest.importorskip("gcp_storage_emulator.server")
    from gcp_storage_emulator.exceptions import NotFound
    from gcp_storage_emulator.handlers import buckets
    from gcp_storage_emulator.handlers import objects as handlers
    from gcp_storage_emulator.storage import Storage

    class Storing(Storage):
        generation = None  # of the object that was asked for last

        def get_file_obj(self, *arguments):
            found = super().get_file_obj(*arguments)
            self.generation = found["generation"]
            return found

    class OneByOne(emulator.RequestHandler):
        """Its storage is meant for one request at a time, its own server for one client."""

        def handle_one_request(self):
            self.raw_requestline = self.rfile.readline(65537)
            if not self.raw_requestline:
                self.close_connection = True
            elif self.parse_request():
                with one:
                    self.storage.generation = None
                    getattr(self, f"do_{self.command}")()
                self.wfile.flush()

        def end_headers(self):
            if self.command == "GET" and self.storage.generation:
                self.send_header("x-goog-generation", self.storage.generation)
            super().end_headers()

    class Quiet(http.server.ThreadingHTTPServer):
        request_queue_size = 1000

        def handle_error(self, request, address):
            pass  # clients that were killed, or that have what they want

    upload, upload_alone = handlers._multipart_upload, handlers._media_upload
    storage, one = Storing(use_memory_fs=True), threading.Lock()
    buckets.create_bucket("bucket", storage)

    def conditional(name_of, upload, asked, response, storage):
        wanted, current = asked.query.get("ifGenerationMatch"), "0"
        with contextlib.suppress(NotFound):
            current = storage.get_file_obj(asked.params["bucket_name"], name_of(asked))["generation"]
        if refuses and wanted is not None and wanted != [current]:
            response.status = http.HTTPStatus.PRECONDITION_FAILED
            return
        if asked.data is None:  # as the emulator calls an object without content, which it then refuses
            asked._data = b""
        upload(asked, response, storage)

    handlers._multipart_upload = functools.partial(conditional, lambda asked: asked.data["meta"]["name"], upload)
    handlers._media_upload = functools.partial(conditional, lambda asked: asked.query["name"][0], upload_alone)
    server = Quiet(("localhost", 0), functools.partial(OneByOne, storage))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://localhost:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        handlers._multipart_upload, handlers._media_upload = upload, upload_alone


@pytest.fixture(params=[True, False], ids=["refuses", "replaces"])
def google(request, monkeypatch, tmp_path):
    """(address, whether an object that exists is not created)."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with google_storage(request.param) as server:
        for name in ("STORAGE_EMULATOR_HOST", "TENSORSTORE_GCS_HTTP_URL"):
            monkeypatch.setenv(name, server)
        yield "gs://bucket/run", request.param


def test_a_storage_that_replaces_what_it_was_asked_to_create_is_refused(google, tmp_path):
    place, refuses = google
    if not refuses:
        with pytest.raises(InputError, match="cannot keep two processes from writing one ledger"):
            Mirror(place, tmp_path / "copies")
        return
    mirror = Mirror(place, tmp_path / "copies")
    mirror.folder.mkdir(parents=True)
    (mirror.folder / "checkpoints" / "2").mkdir(parents=True)
    (mirror.folder / "private").mkdir()
    for name in ("config.json", "private/keys.json", "checkpoints/2/data"):
        (mirror.folder / name).write_text(name)
    mirror.add_line(0, "one")
    mirror.publish()
    mirror.stored(2)
    mirror.wait()
    mirror.add_line(1, "two")
    mirror_lib.copy(Objects(place), tmp_path / "copy")
    found = {
        path.relative_to(tmp_path / "copy").as_posix() for path in (tmp_path / "copy").rglob("*") if path.is_file()
    }
    assert found == {"config.json", "ledger.jsonl", "private/keys.json", "checkpoints/2/data"}
    assert (tmp_path / "copy" / "ledger.jsonl").read_text() == "one\ntwo\n"
    assert (tmp_path / "copy" / "private" / "keys.json").stat().st_mode & 0o777 == 0o600
    mirror.close()
    assert "lock" not in Objects(place).names()


@pytest.mark.slow
@pytest.mark.parametrize("wait_for", ["step", "checkpoint", "stored"])
def test_a_killed_run_goes_on_from_the_storage(text, address, variables, tmp_path, wait_for):
    """In whatever phase: the lock of the dead process is taken over, and no step is charged twice."""
    command = [*runs.COMMAND, *map(str, runs.flags(text, address, steps=40, checkpoint_every=3))]
    process = subprocess.Popen(command, env=runs.ENVIRONMENT | variables, stderr=subprocess.DEVNULL)
    try:
        while sum(line["kind"] == wait_for for line in lines(address)) < 3:
            assert process.poll() is None
            time.sleep(0.02)
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    before = lines(address)
    done = subprocess.run(command, env=runs.ENVIRONMENT | variables, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert not [*(tmp_path / "cache" / "dpgemma" / "copies").iterdir()], "also that of the process that was killed"
    after = lines(address)
    assert after[: len(before)] == before
    assert sorted(line["step"] for line in after if line["kind"] == "step") == list(range(40))
    assert audited(address)["consistent"]


@pytest.mark.slow
@pytest.mark.parametrize("google", [True], indirect=True)
def test_processes_write_their_parts_of_checkpoints_into_the_storage(text, google, tmp_path):
    """Without a disk that they share. Killed, they go on as one process, and the audit reads what all have written."""
    address, _ = google
    given = runs.flags(text, address, steps=6, checkpoint_every=2)
    names = ("STORAGE_EMULATOR_HOST", "TENSORSTORE_GCS_HTTP_URL")
    storage = {name: os.environ[name] for name in names}
    together = ["--num_processes=2", f"--coordinator=localhost:{runs.free_port()}"]
    # Nobody reads what they write: without an account, the storage's package warns at every request.
    processes = [
        subprocess.Popen(
            [*runs.COMMAND, *given, *together, f"--process_id={i}"],
            env=runs.ENVIRONMENT | storage | {"XDG_CACHE_HOME": str(tmp_path / f"cache of {i}")},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for i in range(2)
    ]
    try:
        while not any(line["kind"] == "stored" for line in lines(address)):
            assert not any(process.poll() for process in processes)
            time.sleep(1)
    finally:
        for process in processes:
            process.kill()
            process.wait()
    before = lines(address)
    done = subprocess.run(
        [*runs.COMMAND, *given], env=runs.ENVIRONMENT | storage, capture_output=True, text=True, timeout=400
    )
    assert done.returncode == 0, done.stderr[-2000:]
    after = lines(address)
    assert after[: len(before)] == before
    assert next(line["step"] for line in after if line["kind"] == "resume") in (2, 4)
    assert sorted(line["step"] for line in after if line["kind"] == "step") == list(range(6))
    assert audited(address)["consistent"]


def test_data_are_read_where_they_lie(address, tmp_path):
    """Objects, folders and globs give the records of files on a disk; what is wrong is named by its address."""
    import pyarrow as pa
    from pyarrow import parquet

    folder, there = tmp_path / "data", address.removesuffix("/runs/one") + "/data"
    (folder / "more").mkdir(parents=True)
    (folder / "a.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    (folder / "b.txt.gz").write_bytes(gzip.compress(b"three"))
    (folder / ".hidden").write_text("no")
    parquet.write_table(pa.table({"text": ["four", "five"]}), folder / "more" / "c.parquet")
    storage = Objects(there)
    for path in folder.rglob("*"):
        if path.is_file():
            storage.upload(path, str(path.relative_to(folder)))
    for what in ("", "/a.jsonl", "/*.gz", "/**/*.parquet", "/more"):
        assert list(readers.records(there + what)) == list(readers.records(f"{folder}{what}")), what
    for name in ("there", "here"):
        data = there if name == "there" else str(folder)
        caching.make(tmp_path / name, data, "byte", Reading("sequence", 8, "text"), 1, Silent())
    contents = [json.loads((tmp_path / name / "cache.json").read_text())["files"] for name in ("there", "here")]
    assert contents[0] == contents[1]
    storage.write("bad/d.jsonl", b'{"text": "six"}\nnone\n')
    storage.write("bad/e.parquet", b"PAR1 and nothing else")
    storage.write("cache/cache.json", b"{}")
    for what, said in (
        ("/bad/d.jsonl", r"bad/d\.jsonl, line 2: no JSON object"),
        ("/bad/e.parquet", r"bad/e\.parquet is damaged"),
        ("/nothing", "no object matches"),
        ("/cache", "cache.json among them"),
    ):
        with pytest.raises(InputError, match=said):
            list(readers.records(there + what))
    with pytest.raises(InputError, match="cannot be read"):
        list(readers.records("s3://no-bucket-of-this-name/data"))
    with pytest.raises(InputError, match="no address that can be used"):
        list(readers.records("ftp://host/data"))
