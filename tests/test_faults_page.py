"""The web page with many visitors at once, with networks so small that it is the page that is measured: slow, run by
`make test-faults`. The test of memory takes two minutes and a bit; ten with

    MINUTES=10 python -m pytest -m faults -s tests/test_faults_page.py
"""

import io
import itertools
import json
import os
import re
import socket
import subprocess
import sys
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_networks import save, transformer, vqgan

from utils import ROOT

pytest.importorskip("gradio", reason="gradio is not installed: pip install -r requirements-demo.txt")
httpx = pytest.importorskip("httpx")  # comes with gradio

pytestmark = pytest.mark.faults
MINUTES = float(os.environ.get("MINUTES", "2"))  # of the test of memory
FLAT = 1.05  # at most: memory at the end / memory after two minutes, or after half of them


Image.fromarray(np.pad(np.full((12, 16, 4), 255, np.uint8), ((250,), (248,), (0,)))).save(file := io.BytesIO(), "PNG")
STROKE = file.getvalue()  # what the editor sends


@pytest.fixture
def server(tmp_path):
    """`demo.py` in a process of its own: its address, its number and its folder of temporary files."""
    torch.manual_seed(0)
    model, temporary, log = save(tmp_path / "tiny", vqgan(), transformer()), tmp_path / "tmp", tmp_path / "log"
    temporary.mkdir()
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    command = [sys.executable, "demo.py", "--checkpoint", model, "--port", port, "--device", "cpu"]
    folders = {"TMPDIR": str(temporary), "GRADIO_TEMP_DIR": str(tmp_path / "gradio")}
    with log.open("w") as said:
        process = subprocess.Popen(command, cwd=ROOT, stdout=said, stderr=said, env=os.environ | folders)
    yield SimpleNamespace(address=f"http://127.0.0.1:{port}", pid=process.pid, temporary=temporary)
    process.terminate()
    process.wait(180)
    assert "Traceback" not in log.read_text()


def rest(server) -> float:
    """How long it takes until nothing is filled: of all temporary folders that of the samples is left."""
    start = time.monotonic()
    while len(list(server.temporary.glob("tmp*"))) > 1:
        assert time.monotonic() < start + 180
        time.sleep(0.1)
    return time.monotonic() - start


class Visitor:
    """Somebody who presses Fill, as the page does it; with one seed it is always the same picture."""

    def __init__(self, server, seed: int = 0):
        there = httpx.HTTPTransport(retries=9)  # in two minutes at most
        self.http = httpx.Client(base_url=server.address, timeout=600, transport=there)
        events = self.http.get("/config").json()["dependencies"]
        (self.button,) = (event["id"] for event in events if event["api_name"] == "fill")
        self.session, self.seed, self.pictures = uuid.uuid4().hex, seed, set()

    def stay(self, end: float, leaves: bool) -> list[float]:
        """Fills again and again, or `leaves` each third time and comes back; seconds of all whole fills."""
        seconds = []
        for number in itertools.takewhile(lambda _: time.monotonic() < end, itertools.count(1)):
            if leaves and number % 3 == 0:  # in the middle of a fill, or before it is their turn
                self.fill(6, until="process_generating" if number % 2 else "estimation")
                self.session = uuid.uuid4().hex
            else:
                seconds.append(self.fill())
        return seconds

    def fill(self, samples: int = 1, until: str = "process_completed") -> float:
        """How long it took until the message, after which the connection is closed."""
        start = time.monotonic()
        (path,) = self.http.post("/gradio_api/upload", files={"files": ("layer.png", STROKE)}).json()
        editor = {"background": None, "layers": [{"path": path, "meta": {"_type": "gradio.FileData"}}]}
        data = [editor, None, "tiny", samples, 2, 2, "cosine", "maskgit", 4.5, self.seed, 0]
        call = {"data": data, "fn_index": self.button, "session_hash": self.session}
        self.http.post("/gradio_api/queue/join", json=call).raise_for_status()
        with self.http.stream("GET", "/gradio_api/queue/data", params={"session_hash": self.session}) as answer:
            for line in filter(None, answer.iter_lines()):
                message = json.loads(line.removeprefix("data: "))
                if message["msg"] in (until, "process_completed", "unexpected_error"):
                    break
        assert message["msg"] == until and message.get("success", True), message
        if until == "process_completed":
            url = message["output"]["data"][1]["value"][0]["image"]["url"]
            self.pictures.add(self.http.get(url).raise_for_status().content)
        return time.monotonic() - start


def visit(server, count: int, minutes: float, leaving: int = 0) -> tuple[list[float], np.ndarray]:
    """Of `count` visitors at once, the first `leaving` of whom leave: seconds of all fills, megabytes every second."""
    visitors, memory = [Visitor(server, seed) for seed in range(count)], []
    end = time.monotonic() + 60 * minutes
    with ThreadPoolExecutor(count) as pool:
        stays = [pool.submit(visitor.stay, end, visitor.seed < leaving) for visitor in visitors]
        while not all(stay.done() for stay in stays):
            memory.append(int(re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{server.pid}/status").read_text())[1]) / 1024)
            time.sleep(1)
    seconds = [second for stay in stays for second in stay.result()]  # raises what went wrong
    assert all(len(visitor.pictures) == 1 for visitor in visitors)
    assert len(set.union(*(visitor.pictures for visitor in visitors))) == count  # each their own
    return seconds, np.array(memory)


def test_eight_visitors_take_turns(server):
    alone = Visitor(server)
    one = np.median([alone.fill() for _ in range(12)])
    seconds, _ = visit(server, 8, 1)
    slow = np.quantile(seconds, 0.99)
    print(f"one {one:.2f} s; of eight: median {np.median(seconds):.2f} s, p99 {slow:.2f} s, {len(seconds)} fills")
    assert slow <= 3 * 8 * one


def test_memory_stays_flat_under_32_visitors_of_whom_some_leave(server):
    seconds, memory = visit(server, 32, MINUTES, leaving=8)
    print(f"{len(seconds)} fills, median {np.median(seconds):.1f} s; MB every 20 s: {memory[::20].round().tolist()}")
    before = int(60 * min(2, MINUTES / 2))
    assert np.median(memory[-15:]) <= FLAT * np.median(memory[before : before + 15])
    assert rest(server) < 60


def test_a_fill_that_nobody_waits_for_ends(server):
    visitors = [Visitor(server, seed) for seed in range(8)]
    visitors[0].fill()  # the first of a process is slow
    whole = visitors[0].fill(6)
    for visitor in visitors:
        visitor.fill(6, until="process_generating")
    took = rest(server)
    print(f"{whole:.1f} s are a whole fill; {took:.1f} s after the last of eight has left all have ended")
    assert took < whole / 2
