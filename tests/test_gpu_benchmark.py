"""`benchmarks/gpu.py` from end to end on models of a few thousand parameters."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import gpu, gpu_text
from sfumato.models.decoder import Decoder


def run(monkeypatch: pytest.MonkeyPatch, out: Path, *more: str) -> int:
    """Run the command."""
    arguments = ["gpu", "--device", "cpu", "--tiny", "--out", str(out), *more]
    monkeypatch.setattr("sys.argv", arguments)
    return gpu.main()


def test_a_section_is_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    out = tmp_path / "page.md"
    assert run(monkeypatch, out, "--only", "d3llm,kernels") == 0
    page = out.read_text(encoding="utf-8")
    assert page.startswith("# CPU\n")
    assert "d3LLM's window" in page
    assert "No kernel runs on this device: it is a CPU" in page


def test_what_breaks_loses_no_other_figure(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def broken(forwards: object) -> int:
        raise RuntimeError("no such device")

    monkeypatch.setattr(gpu_text, "touched_bytes", broken)
    out = tmp_path / "page.md"
    assert run(monkeypatch, out, "--only", "a denoise step,d3llm") == 1
    page = out.read_text(encoding="utf-8")
    assert page.count("RuntimeError: no such device") == 2
    assert "forwards/s" in page


def test_no_section_begins_without_time(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    out = tmp_path / "page.md"
    assert run(monkeypatch, out, "--budget", "0") == 1
    assert out.read_text(encoding="utf-8").count("no time was left for it") == 8


def test_a_proof_does_not_take_the_place_of_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit):
        run(monkeypatch, gpu.OUT)


@pytest.mark.parametrize(("name", "billions"), [("llada-8b", 8.0), ("llada2-mini", 16.3)])
def test_the_configurations_are_the_real_ones(name: str, billions: float) -> None:
    from benchmarks.gpu_models import real_config
    from sfumato.models.weights import build_on_meta, count_parameters

    model, targets = build_on_meta(real_config(name, is_tiny=False))
    assert isinstance(model, Decoder)
    assert count_parameters(targets) / 1e9 == pytest.approx(billions, rel=0.03)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_every_section_ends(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert run(monkeypatch, tmp_path / "page.md") == 0
