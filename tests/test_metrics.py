"""The log survives crashes, the console says what matters, and the arithmetic of MFU and ETA is right."""

import json
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from nanochat_jax import metrics
from nanochat_jax.errors import UserError
from nanochat_jax.metrics import Console, MetricsLog


def test_log_is_one_json_object_a_line_and_flushed(tmp_path):
    log = MetricsLog(tmp_path / "base")
    log.write("train", step=0, loss=np.float32(2.5), tok_per_sec=jax.numpy.float32(10), mfu=None)
    log.write("pass_at_k", step=1, **{"pass": {1: np.float64(0.5)}}, bad=float("nan"))
    lines = (tmp_path / "base" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [
        {"kind": "train", "step": 0, "loss": 2.5, "tok_per_sec": 10.0, "mfu": None},
        {"kind": "pass_at_k", "step": 1, "pass": {"1": 0.5}, "bad": None},
    ]


def test_torn_last_line_is_ignored_and_does_not_swallow_the_next_record(tmp_path):
    log = MetricsLog(tmp_path)
    log.write("train", step=0)
    log.close()
    with log.path.open("a") as file:
        file.write('{"kind": "train", "st')
    assert [r["step"] for r in MetricsLog.read(log.path)] == [0]
    log = MetricsLog(tmp_path)
    log.drop_after(1)
    log.write("train", step=1)
    assert [r["step"] for r in MetricsLog.read(log.path)] == [0, 1]


def test_damage_elsewhere_is_an_error_that_names_the_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"kind": "train", "step": 0}\nrubbish\n{"kind": "train", "step": 2}\n')
    with pytest.raises(UserError, match="line 2"):
        MetricsLog.read(path)
    for line in ("5", "null", "[1]", '{"step": 1}', '{"kind": 3}', '{"kind": "train", "step": "1"}'):
        path.write_text(f'{{"kind": "start"}}\n{line}\n')
        with pytest.raises(UserError, match="line 2 is no record"):
            MetricsLog(tmp_path).drop_after(1)


def test_resume_forgets_what_will_be_written_again(tmp_path):
    log = MetricsLog(tmp_path)
    log.write("start", device="cpu")
    for step in range(6):
        log.write("train", step=step)
        log.write("val", step=step)
    log.drop_after(3)
    log.write("train", step=3)
    records = MetricsLog.read(log.path)
    assert [r["step"] for r in records if r["kind"] == "train"] == [0, 1, 2, 3]
    # Validation 3 was made with the three steps that are kept.
    assert [r["step"] for r in records if r["kind"] == "val"] == [0, 1, 2, 3]
    assert records[0]["kind"] == "start" and [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_console_lines(capsys):
    Console("base", 200).step(
        7, loss=3.21, lr_mult=0.5, tok_per_sec=12345.0, mfu=None, step_seconds=0.25, eta_seconds=65.0
    )
    out, err = capsys.readouterr()
    assert out == "" and err == "base   7/200 | loss 3.2100 | lr x0.500 | 12.3k tok/s | 250 ms | ETA 1m05s\n"
    Console("rl", 9).step(3, reward=0.25, mfu=0.41, **{"pass": {"1": 0.5}})
    assert capsys.readouterr().err == "rl 3/9 | reward 0.250 | pass@1 0.500 | MFU 41.0%\n"


def test_banner_is_aligned_and_leaves_out_the_unknown(capsys):
    metrics.banner("base", mesh="data=8", parameters=1_234_567, memory_bytes=3 * 2**30, attention=None)
    title, mesh, parameters, memory = capsys.readouterr().err.splitlines()
    assert title.startswith("== base ")
    assert parameters.split() == ["parameters", "1,234,567", "(1.23M)"] and memory.split()[1:] == ["3.00", "GiB"]
    assert mesh.index("data=8") == parameters.index("1,234") == memory.index("3.00")


@pytest.mark.parametrize("value, text", [(999_999, "1000k"), (1.5e9, "1.5B"), (12, "12"), (4.2e19, "42E")])
def test_si(value, text):
    assert metrics.si(value) == text


def test_peak_flops_by_kind():
    def peak(kind, platform="gpu"):
        return metrics.peak_flops(SimpleNamespace(platform=platform, device_kind=kind))

    assert peak("NVIDIA H100 80GB HBM3") == peak("NVIDIA H200") == 989e12
    assert peak("NVIDIA A100-SXM4-80GB") == 312e12 and peak("NVIDIA H100 PCIe") == 756e12
    assert peak("NVIDIA H20") == 148e12 and peak("NVIDIA L4") != peak("NVIDIA L40S")
    assert peak("NVIDIA GB200") == 2500e12 and peak("NVIDIA H200 NVL") == 836e12 and peak("NVIDIA A10") == 125e12
    assert peak("cpu", "cpu") is None and peak("Some new chip") is None


def test_peak_bandwidth_is_that_of_the_same_chip():
    def peak(kind, platform="gpu"):
        return metrics.peak_bandwidth(SimpleNamespace(platform=platform, device_kind=kind))

    assert (
        peak("NVIDIA H100 80GB HBM3") == 3.35e12 and peak("NVIDIA H100 PCIe") == 2e12 and peak("NVIDIA H200") == 4.8e12
    )
    assert peak("cpu", "cpu") is None and peak("Some new chip") is None


def test_mfu(monkeypatch):
    monkeypatch.setattr(metrics, "peak_flops", lambda device: 1e12)
    assert metrics.mfu(1000.0, 1e9, 2) == pytest.approx(0.5)
    monkeypatch.setattr(metrics, "peak_flops", lambda device: None)
    assert metrics.mfu(1000.0, 1e9, 2) is None


def test_pace_leaves_the_compiling_step_out_of_the_eta(monkeypatch):
    clock = iter([0.0, 100.0, 102.0, 110.0, 112.0])
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: next(clock))
    pace = metrics.Pace(total_steps=10, tokens_per_step=50, flops_per_token=1.0, n_devices=1)
    assert pace.lap(1)["step_seconds"] == 100.0
    assert pace.lap(2) == {"step_seconds": 2.0, "tok_per_sec": 25.0, "mfu": None, "eta_seconds": 16.0}
    pace.skip()
    assert pace.lap(3)["step_seconds"] == 2.0


def test_peak_memory_is_plausible():
    assert 10 * 2**20 < metrics.peak_memory_bytes() < 2**40
