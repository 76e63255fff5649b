"""Downloading against a local server that breaks in every way a real one does."""

import dataclasses
import hashlib
import io
import json
import threading
import zipfile
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nanochat_jax import cli, run
from nanochat_jax.config import Config, DataConfig, EvalConfig, FinetuneConfig, RLConfig
from nanochat_jax.data import download as module
from nanochat_jax.data.download import ensure_shards, fetch, fetch_eval_bundle, prepare_shards
from nanochat_jax.data.files import write_json
from nanochat_jax.data.shards import Shard, shard_files
from nanochat_jax.errors import UserError
from nanochat_jax.stages import tokenizer as tokenizer_stage


class Server(ThreadingHTTPServer):
    """Serves `files` by path; `faults` holds, per path, what to do wrong in the next answers."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        self.faults: dict[str, list] = {}
        self.etags: dict[str, str] = {}
        self.asked: list[tuple[str, str | None]] = []
        self.codings: set[str | None] = set()
        self.url = f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def do_GET(self):
        server: Server = self.server
        server.asked.append((self.path, self.headers.get("Range")))
        server.codings.add(self.headers.get("Accept-Encoding"))
        faults = server.faults.get(self.path, [])
        fault = faults.pop(0) if faults else None
        body = server.files.get(self.path)
        if isinstance(fault, int):
            self.send_response(fault)
            self.send_header("Retry-After", "0")
            self.end_headers()
            return
        if body is None:
            self.send_error(404)
            return
        start = 0
        if self.headers.get("Range") and fault != "no range":
            start = int(self.headers["Range"].removeprefix("bytes=").removesuffix("-"))
        if start >= len(body) > 0:
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(body)}")
            self.end_headers()
            return
        self.send_response(206 if start else 200)
        if start and fault == "elsewhere":
            start = 0
            self.send_header("Content-Range", f"bytes 0-{len(body) - 1}/*")
        elif start:
            self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        self.send_header("Content-Length", str(len(body) - start))
        if self.path in server.etags:
            self.send_header("X-Linked-ETag", f'"{server.etags[self.path]}"')
        self.end_headers()
        sent = body[start:]
        if fault == "cut":
            self.wfile.write(sent[: len(sent) // 2])
            self.wfile.flush()
            self.connection.close()
        elif fault == "garble":
            self.wfile.write(sent[::-1])
        else:
            self.wfile.write(sent)


@pytest.fixture
def server(monkeypatch):
    server = Server()
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    monkeypatch.setenv("EVAL_BUNDLE_URL", f"{server.url}/bundle.zip")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(module, "SETS", {"fineweb-edu": module.ShardSet("some/set", 4)})
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def lines():
    return []


def parquet(*texts, column="text"):
    file = io.BytesIO()
    pq.write_table(pa.table({column: pa.array(texts, pa.string())}), file)
    return file.getvalue()


def serve_set(server, *indices):
    for i in indices:
        server.files[f"/datasets/some/set/resolve/main/shard_{i:05d}.parquet"] = parquet(f"document of shard {i}")


DATA = bytes(range(256)) * 4000


def test_tokenizers_to_compare_with_are_fetched_where_the_shards_are(server, tmp_path, lines, monkeypatch):
    serve_set(server, 0, 4)
    server.files |= {"/vocab.bpe": b"1", "/encoder.json": b"2"}
    names = {"gpt2": ("gpt2", ("vocab.bpe", "encoder.json")), "gpt4": ("cl100k_base", ("gone.tiktoken",))}
    others = {name: (known, tuple(f"{server.url}/{file}" for file in files)) for name, (known, files) in names.items()}
    monkeypatch.setattr(tokenizer_stage, "OTHERS", others)
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "tiktoken"))
    learned = []
    monkeypatch.setattr(tokenizer_stage, "learn", lambda *given: learned.append(given))
    config = DataConfig(source="fineweb-edu", num_shards=1, cache=str(tmp_path / "cache"))
    tokenizer_stage.run(dataclasses.replace(Config(), data=config), tmp_path / "run", lines.append)
    kept = {path.name: path.read_bytes() for path in (tmp_path / "tiktoken").iterdir() if path.suffix != ".part"}
    assert kept == {
        hashlib.sha1(f"{server.url}/{name}".encode()).hexdigest(): server.files[f"/{name}"] for name in names["gpt2"][1]
    }
    assert learned and any("gone.tiktoken answers 404" in line for line in lines)
    asked = len(server.asked)
    tokenizer_stage.run(
        dataclasses.replace(Config(), data=DataConfig(source="embedded")), tmp_path / "run", lines.append
    )
    assert len(server.asked) == asked and len(learned) == 2


def test_fetch_resumes_where_the_connection_broke(server, tmp_path, lines):
    server.files["/f"] = DATA
    server.faults["/f"] = ["cut", "cut"]
    fetch(f"{server.url}/f", tmp_path / "deep" / "f", lines.append, backoff=0.01)
    assert (tmp_path / "deep" / "f").read_bytes() == DATA
    starts = [int(r.removeprefix("bytes=").removesuffix("-")) for _, r in server.asked[1:]]
    assert len(starts) == 2 and 0 < starts[0] < starts[1] < len(DATA)
    assert len(lines) == 2 and "trying again" in lines[0]
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["f"]
    assert server.codings == {"identity"}  # places in a compressed answer are not those of the file


def test_fetch_goes_on_with_the_part_of_an_earlier_process(server, tmp_path):
    server.files["/f"] = DATA
    (tmp_path / "f.part").write_bytes(DATA[:1000])
    fetch(f"{server.url}/f", tmp_path / "f", print)
    assert (tmp_path / "f").read_bytes() == DATA
    assert server.asked == [("/f", "bytes=1000-")]


def test_fetch_ends_with_a_part_that_was_already_whole(server, tmp_path):
    server.files["/f"] = DATA
    (tmp_path / "f.part").write_bytes(DATA)
    fetch(f"{server.url}/f", tmp_path / "f", print)
    assert (tmp_path / "f").read_bytes() == DATA


@pytest.mark.parametrize("stale", [DATA + b"more", b"x" * 1000])
def test_fetch_throws_a_foreign_part_away(server, tmp_path, lines, stale):
    server.files["/f"] = DATA
    server.etags["/f"] = hashlib.sha256(DATA).hexdigest()
    (tmp_path / "f.part").write_bytes(stale)
    fetch(f"{server.url}/f", tmp_path / "f", lines.append, backoff=0.01)
    assert (tmp_path / "f").read_bytes() == DATA
    assert server.asked[-1] == ("/f", None)


def test_fetch_starts_over_where_the_server_cannot_resume(server, tmp_path):
    server.files["/f"] = DATA
    server.faults["/f"] = ["no range"]
    (tmp_path / "f.part").write_bytes(b"y" * 1000)
    fetch(f"{server.url}/f", tmp_path / "f", print)
    assert (tmp_path / "f").read_bytes() == DATA
    assert len(server.asked) == 1


def test_fetch_starts_over_where_the_server_resumes_elsewhere(server, tmp_path, lines):
    server.files["/f"] = DATA
    server.faults["/f"] = ["elsewhere"]
    (tmp_path / "f.part").write_bytes(DATA[:1000])
    fetch(f"{server.url}/f", tmp_path / "f", lines.append, backoff=0.01)
    assert (tmp_path / "f").read_bytes() == DATA
    assert server.asked == [("/f", "bytes=1000-"), ("/f", None)] and "another place" in lines[0]


def test_fetch_waits_out_a_busy_server(server, tmp_path, lines):
    server.files["/f"] = DATA
    server.faults["/f"] = [429, 503, 500]
    fetch(f"{server.url}/f", tmp_path / "f", lines.append, backoff=0.01)
    assert (tmp_path / "f").read_bytes() == DATA
    assert len(server.asked) == 4


def test_fetch_honours_retry_after(monkeypatch):
    response = module.requests.Response()
    response.headers["Retry-After"] = "7"
    assert module._retry_after(response) == 7
    monkeypatch.setattr(module.time, "time", lambda: 1445412000.0)
    response.headers["Retry-After"] = "Wed, 21 Oct 2015 07:28:00 GMT"
    assert module._retry_after(response) == 480
    response.headers["Retry-After"] = "soon"
    assert module._retry_after(response) is None


def test_fetch_gives_up_with_one_line_and_leaves_no_file(server, tmp_path, lines):
    server.files["/f"] = DATA
    server.faults["/f"] = [500] * 6
    with pytest.raises(UserError, match=r"could not download .*/f in 6 attempts: status 500") as caught:
        fetch(f"{server.url}/f", tmp_path / "f", lines.append, backoff=0.01)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "f").exists()
    with pytest.raises(UserError, match="answers 404"):
        fetch(f"{server.url}/nothing", tmp_path / "g", lines.append)
    assert [path for path, _ in server.asked].count("/nothing") == 1


def test_fetch_believes_the_hash_that_the_server_tells(server, tmp_path, lines):
    server.files["/f"] = DATA
    server.etags["/f"] = hashlib.sha256(DATA).hexdigest()
    server.faults["/f"] = ["garble"]
    fetch(f"{server.url}/f", tmp_path / "f", lines.append, backoff=0.01)
    assert (tmp_path / "f").read_bytes() == DATA
    assert "sha256" in lines[0]
    server.etags["/f"] = "0" * 64
    with pytest.raises(UserError, match="sha256"):
        fetch(f"{server.url}/f", tmp_path / "g", lines.append, backoff=0.01)
    assert not (tmp_path / "g").exists()


def test_an_address_that_is_none_is_not_tried_again(tmp_path, lines, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "hub.example.org")
    with pytest.raises(UserError, match=r"hub.example.org/.* is no address to download from: .*scheme"):
        fetch(module.SETS["climbmix"].url(0), tmp_path / "a", lines.append)
    assert not lines


def test_offline_is_said(server, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match="HF_HUB_OFFLINE"):
        fetch(f"{server.url}/f", tmp_path / "f", print)
    assert not server.asked


def test_two_processes_fetch_one_file_once(server, tmp_path):
    server.files["/f"] = DATA
    threads = [threading.Thread(target=fetch, args=(f"{server.url}/f", tmp_path / "f", print)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (tmp_path / "f").read_bytes() == DATA
    assert len(server.asked) == 1


def test_shards_come_validation_first(server, tmp_path, lines):
    serve_set(server, 0, 1, 2, 3, 4)
    config = DataConfig(cache=str(tmp_path), num_shards=2)
    train, validation = prepare_shards(config, lines.append)
    assert [p.name for p in train] == ["shard_00000.parquet", "shard_00001.parquet"]
    assert validation.name == "shard_00004.parquet"
    assert server.asked[0][0].endswith("shard_00004.parquet")
    assert len(server.asked) == 3 and any("3/3" in line for line in lines)
    prepare_shards(config, lines.append)
    assert len(server.asked) == 3
    assert len(prepare_shards(dataclasses.replace(config, num_shards=3), lines.append)[0]) == 3
    assert len(prepare_shards(config, lines.append)[0]) == 2


def test_no_validation_shard_no_run(server, tmp_path, lines):
    serve_set(server, 0, 1, 2)
    config = DataConfig(cache=str(tmp_path), num_shards=2)
    with pytest.raises(UserError, match=r"shard_00004.*404"):
        ensure_shards(config, lines.append)
    assert len(server.asked) == 1
    serve_set(server, 4)
    folder = ensure_shards(config, lines.append)
    with pytest.raises(UserError, match=r"lacks shard_00005.parquet, 1 of the 2 files"):
        shard_files(folder, ["shard_00000.parquet", "shard_00005.parquet"])


def test_files_that_do_not_belong_to_a_set_are_left_alone(server, tmp_path, lines):
    serve_set(server, 0, 1, 2, 4)
    config = DataConfig(cache=str(tmp_path), num_shards=2)
    expected = prepare_shards(config, lines.append)
    # Neither what sorts first, nor between, nor last belongs, nor what a longer download left that broke off.
    for name in ("a.parquet", "shard_00000_copy.parquet", "zzz.parquet"):
        (expected[1].parent / name).write_bytes(parquet("not of the set"))
    with pytest.raises(UserError, match=r"shard_00003.*404"):
        ensure_shards(dataclasses.replace(config, num_shards=4), lines.append)
    assert prepare_shards(config, lines.append) == expected


def test_a_run_keeps_to_the_files_it_was_started_with(tmp_path, lines):
    folder = tmp_path / "shards"
    for name in ("b.parquet", "c.parquet", "d.parquet"):
        write(folder, name, parquet(name))
    config = Config(data=DataConfig(dir=str(folder)))
    workdir = tmp_path / "run"
    run.open_run(config, workdir)
    assert run.recorded_files(workdir, config.data) is None
    train, validation = prepare_shards(config.data, lines.append)
    run.record_data(workdir, [*train, validation])
    for name in ("a.parquet", "e.parquet"):
        write(folder, name, parquet(name))
    recorded = run.recorded_files(workdir, config.data)
    assert prepare_shards(config.data, lines.append, recorded) == (train, validation)
    assert lines == [f"{folder}: a.parquet, e.parquet came after this run was started, left alone"]
    write(folder, "c.parquet", parquet("of another size " * 20))
    with pytest.raises(UserError, match=r"bytes of c.parquet was \d+, now \d+"):
        run.record_data(workdir, [*prepare_shards(config.data, lines.append, recorded)[0], validation])
    (folder / "c.parquet").unlink()
    with pytest.raises(UserError, match=r"lacks c.parquet, 1 of the 3 files of its set or run"):
        prepare_shards(config.data, lines.append, recorded)
    # Another folder is another list, and so is another set.
    assert run.recorded_files(workdir, DataConfig(dir=str(tmp_path))) is None
    run.open_run(Config(data=DataConfig(source="climbmix")), tmp_path / "other")
    run.record_data(tmp_path / "other", [validation])
    assert run.recorded_files(tmp_path / "other", DataConfig(source="climbmix")) == [validation.name]
    assert run.recorded_files(tmp_path / "other", DataConfig(source="embedded")) is None


def test_a_shard_that_is_no_parquet_is_not_kept(server, tmp_path, lines, monkeypatch):
    monkeypatch.setattr(module, "fetch", lambda *args, **kw: fetch(*args, backoff=0.01, **kw))
    serve_set(server, 0, 1, 4)
    server.files["/datasets/some/set/resolve/main/shard_00001.parquet"] = b"<html>quota exceeded</html>"
    with pytest.raises(UserError, match=r"shard_00001.*cannot be read as parquet"):
        ensure_shards(DataConfig(cache=str(tmp_path), num_shards=2), lines.append)
    assert not (tmp_path / "fineweb-edu" / "shard_00001.parquet").exists()


def test_a_full_disk_and_wrong_counts_are_seen_before(server, tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"num-shards 5: .* 1 to 4"):
        ensure_shards(DataConfig(cache=str(tmp_path), num_shards=5), print)
    monkeypatch.setattr(module.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 5_000_000}))
    with pytest.raises(UserError, match=r"0.0 GB free, 3 shards need 0.3"):
        ensure_shards(DataConfig(cache=str(tmp_path), num_shards=2), print)
    assert not server.asked


def test_the_embedded_corpus_needs_no_network(server):
    train, validation = prepare_shards(DataConfig(source="embedded"), print)
    assert len(train) == 3 and validation.name == "shard_00003.parquet"
    assert not server.asked


def test_json_files_are_whole_or_what_they_were(tmp_path):
    path = tmp_path / "deep" / "a.json"
    write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        write_json(path, {"a": 2, "b": object()})
    assert json.loads(path.read_text()) == {"a": 1}


def write(folder, name, data):
    folder.mkdir(exist_ok=True)
    (folder / name).write_bytes(data)


def test_folders_that_cannot_be_used_are_one_line(tmp_path):
    folder = tmp_path / "shards"
    with pytest.raises(UserError, match="no folder"):
        shard_files(folder)
    write(folder, "b.parquet", parquet("one"))
    write(folder, "readme.txt", b"not counted")
    write(folder, "._b.parquet", b"what a Mac leaves beside a copy")
    write(folder, "c.parquet.gz", b"not counted")
    with pytest.raises(UserError, match=r"holds 1 files named \*\.parquet; at least 2"):
        shard_files(folder)
    write(folder, "a.PARQUET", parquet("one"))
    assert shard_files(folder) == ([folder / "a.PARQUET"], folder / "b.parquet")
    write(folder, "c.parquet", parquet("one", column="body"))
    with pytest.raises(UserError, match=r"c.parquet has no column `text`, only body"):
        shard_files(folder)
    write(folder, "c.parquet", parquet("one")[:-20])
    with pytest.raises(UserError, match=r"c.parquet cannot be read as parquet") as caught:
        shard_files(folder)
    assert "\n" not in str(caught.value)
    pq.write_table(pa.table({"text": [1, 2]}), folder / "c.parquet")
    with pytest.raises(UserError, match="of type int64, not string"):
        shard_files(folder)
    pq.write_table(pa.Table.from_arrays([["a"], ["b"]], names=["text", "text"]), folder / "c.parquet")
    with pytest.raises(UserError, match=r"c.parquet has 2 columns `text`"):
        shard_files(folder)


def test_damage_inside_a_shard_names_the_row_group(tmp_path):
    path = tmp_path / "s.parquet"
    table = pa.table({"text": [f"{i} words " * 50 for i in range(200)]})
    pq.write_table(table, path, row_group_size=100, compression="zstd", write_page_checksum=False)
    data = bytearray(path.read_bytes())
    start = pq.ParquetFile(path).metadata.row_group(1).column(0).dictionary_page_offset
    data[start + 40 : start + 200] = b"\xff" * 160
    path.write_bytes(data)
    assert len(Shard(path).texts(0)) == 100
    with pytest.raises(UserError, match=r"s.parquet, row group 1 cannot be read"):
        Shard(path).texts(1)
    pq.write_table(pa.table({"text": ["a", None]}), path, write_statistics=False)
    with pytest.raises(UserError, match="1 rows have no text"):
        Shard(path).texts(0)
    broken = pa.StringArray.from_buffers(1, pa.py_buffer(np.asarray([0, 2], np.int32)), pa.py_buffer(b"a\xff"))
    pq.write_table(pa.table({"text": broken}), path)
    with pytest.raises(UserError, match=r"row group 0 cannot be read as parquet .*utf-8"):
        Shard(path).texts(0)


def test_rows_without_text_are_known_before_they_are_reached(tmp_path):
    texts = pa.array([*"abcdef", None])
    pq.write_table(pa.table({"n": [{"text": 1}] * 7, "text": texts}), tmp_path / "a.parquet", row_group_size=3)
    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "b.parquet")
    with pytest.raises(UserError, match=r"a.parquet, row group 2: 1 rows have no text"):
        shard_files(tmp_path)


def bundle(**members):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, text in members.items():
            archive.writestr(name, text)
    return file.getvalue()


def test_the_bundle_is_unpacked_once(server, tmp_path, lines):
    server.files["/bundle.zip"] = bundle(**{"eval_bundle/core.yaml": "tasks", "eval_bundle/eval_data/a.jsonl": "{}"})
    config = DataConfig(cache=str(tmp_path))
    folder = fetch_eval_bundle(config, lines.append)
    assert (folder / "core.yaml").read_text() == "tasks" and (folder / "eval_data" / "a.jsonl").exists()
    assert fetch_eval_bundle(config, lines.append) == folder and len(server.asked) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["eval_bundle"]
    assert fetch_eval_bundle(DataConfig(eval_bundle=str(folder)), print) == folder
    with pytest.raises(UserError, match=r"has no core.yaml"):
        fetch_eval_bundle(DataConfig(eval_bundle=str(tmp_path)), print)


def damaged():
    data = bytearray(bundle(**{"eval_bundle/core.yaml": "tasks " * 50}))
    data[60] ^= 1
    return bytes(data)


def test_runs_that_start_together_unpack_the_bundle_once(server, tmp_path, lines):
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as bundle:
        bundle.writestr("eval_bundle/core.yaml", "icl_tasks: []")
        bundle.writestr("eval_bundle/data", bytes(5_000_000))
    server.files["/bundle.zip"] = archive.getvalue()
    config = DataConfig(cache=str(tmp_path))
    with ThreadPoolExecutor(4) as threads:
        found = set(threads.map(lambda _: fetch_eval_bundle(config, lines.append), range(4)))
    assert found == {tmp_path / "eval_bundle"} and (tmp_path / "eval_bundle" / "core.yaml").is_file()
    assert len([path for path, _ in server.asked if path == "/bundle.zip"]) == 1


@pytest.mark.parametrize("archive", [b"<html>", damaged(), bundle(**{"eval_bundle/other.yaml": ""})])
def test_bundles_that_are_wrong_leave_nothing_behind(server, tmp_path, lines, archive):
    server.files["/bundle.zip"] = archive
    with pytest.raises(UserError, match="is damaged, or holds no core"):
        fetch_eval_bundle(DataConfig(cache=str(tmp_path)), lines.append)
    assert not list(tmp_path.iterdir())


def test_without_a_network_it_says_how_else(server, tmp_path, lines):
    with pytest.raises(UserError, match=r"answers 404.*; or unpack the bundle somewhere and set --data.eval-bundle"):
        fetch_eval_bundle(DataConfig(cache=str(tmp_path)), lines.append)


def test_no_bundle_writes_outside_of_its_folder(server, tmp_path, lines):
    outside = {"../outside": "x", "/tmp/nanochat_jax_outside": "x"}
    server.files["/bundle.zip"] = bundle(**{"eval_bundle/core.yaml": "tasks"}, **outside)
    fetch_eval_bundle(DataConfig(cache=str(tmp_path / "cache")), lines.append)
    assert [path.name for path in tmp_path.iterdir()] == ["cache"] and not Path("/tmp/nanochat_jax_outside").exists()
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["eval_bundle"]


def test_the_command_brings_shards_and_bundle(server, tmp_path, capsys):
    serve_set(server, 0, 1, 4)
    server.files["/bundle.zip"] = bundle(**{"core.yaml": "tasks"})
    made = ("arithmetic",)
    config = Config(
        data=DataConfig(cache=str(tmp_path), num_shards=2),
        mid=FinetuneConfig(mixture=made),
        sft=FinetuneConfig(mixture=made),
        rl=RLConfig(task="arithmetic"),
        eval=EvalConfig(chat=made),
    )
    cli.download(cli.Options(config), tmp_path / "run")
    assert (tmp_path / "eval_bundle" / "core.yaml").exists()
    assert "2 training shards and shard_00004.parquet" in capsys.readouterr().err
