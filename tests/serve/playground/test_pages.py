"""The page's files: served without a key, under a strict policy, from the package alone."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import httpx
import pytest

from sfumato.serve.playground.pages import POLICY, STATIC
from tests.serve.running import Server

ROOT = Path(__file__).resolve().parents[3]
SOURCE = ROOT / "playground"


def test_the_page_needs_no_key_and_has_a_strict_policy(embedded: Server) -> None:
    for path in ("/", "/playground/playground.js", "/playground/playground.css", "/playground/icon.svg"):
        answer = httpx.get(f"{embedded.url}{path}")
        assert answer.status_code == 200
        assert answer.headers["content-security-policy"] == POLICY
        assert answer.headers["x-content-type-options"] == "nosniff"
    assert "unsafe" not in POLICY
    assert "default-src 'none'" in POLICY


@pytest.mark.parametrize(
    "path",
    ["/playground/", "/playground/pages.py", "/playground/..%2fpages.py", "/playground/inter-LICENSE.txt"],
)
def test_nothing_else_is_served(embedded: Server, path: str) -> None:
    assert httpx.get(f"{embedded.url}{path}").status_code == 404


def test_all_embedded_models_are_served(embedded: Server) -> None:
    assert embedded.process.stdout is not None
    assert embedded.process.stdout.readline() == f"Watch it denoise: {embedded.url}/\n"
    data = embedded.http.get("/v1/models").json()["data"]
    assert [model["makes"] for model in data] == ["text", "text", "image"]


def test_nothing_stands_inline_or_comes_from_elsewhere() -> None:
    html = (STATIC / "index.html").read_text()
    assert not re.search(r"\son\w+=|style=|<style|<script>", html)
    for name in ("index.html", "playground.css"):
        assert not re.search(r"https?://|//[a-z]+\.", (STATIC / name).read_text())
    loaded = re.findall(r'(?:src|href)="([^"]+)"', html)
    assert all((STATIC / Path(path).name).exists() and path.startswith("/playground/") for path in loaded)
    fonts = re.findall(r'url\("?\./([^")]+)"?\)', (STATIC / "playground.css").read_text())
    assert fonts
    assert all((STATIC / font).exists() for font in fonts)


def test_nothing_is_inserted_as_html() -> None:
    sources = [path.read_text() for path in SOURCE.glob("src/**/*.ts*")]
    assert sources
    for source in sources:
        assert not re.search(
            r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|new Function", source
        )


def test_the_lock_file_belongs_to_no_machine() -> None:
    lock = json.loads((SOURCE / "package-lock.json").read_text())
    assert lock["packages"]
    assert not any("resolved" in package for package in lock["packages"].values())
    named = json.loads((SOURCE / "package.json").read_text())
    for versions in (named["dependencies"], named["devDependencies"]):
        assert all(re.fullmatch(r"\d+\.\d+\.\d+", version) for version in versions.values())


@pytest.mark.slow
def test_the_bundle_is_what_its_source_makes(tmp_path: Path) -> None:
    if shutil.which("npm") is None:
        pytest.skip("npm is not installed")
    copy = tmp_path / "playground"
    shutil.copytree(SOURCE, copy, ignore=shutil.ignore_patterns("node_modules"))
    subprocess.run(["npm", "ci", "--no-audit", "--no-fund"], cwd=copy, check=True, timeout=240)
    subprocess.run(["npm", "run", "check"], cwd=copy, check=True, timeout=120)
    subprocess.run(["node", "build.mjs", str(tmp_path / "made")], cwd=copy, check=True, timeout=60)
    made = {path.name: path.read_bytes() for path in (tmp_path / "made").iterdir()}
    kept = {path.name: path.read_bytes() for path in STATIC.iterdir()}
    assert made.keys() == kept.keys()
    assert [name for name in made if made[name] != kept[name]] == []
