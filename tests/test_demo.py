"""The web page: what is behind it with tiny networks, and, where Chromium and Playwright are, the page itself."""

import itertools
import json
import re
import shutil
import socket
import urllib.request

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image

gr = pytest.importorskip("gradio", reason="gradio is not installed: pip install -r requirements-demo.txt")

from tiny_networks import DECODING, save, transformer, vqgan  # noqa: E402

import demo  # noqa: E402, without gradio there is no page
from maskgit.inpainter import CATS, PHOTOS, Inpainter  # noqa: E402
from maskgit.iterations import iterations  # noqa: E402
from maskgit.masks import FAMILIES, make_holes  # noqa: E402
from photos import editor  # noqa: E402
from photos.fill import fill_photo  # noqa: E402
from photos.photo import read_photo  # noqa: E402

SETTINGS = (4, 4, "cosine", "maskgit", 4.5, 0, 0)  # steps, sweet spot, schedule, sampler, temperature, seed, grow


@pytest.fixture(scope="module")
def inpainter() -> Inpainter:
    torch.manual_seed(1)
    return Inpainter(vqgan(), transformer(), DECODING, "cpu")


@pytest.fixture
def page(inpainter):
    return demo.Page({"tiny": inpainter}, "squares")


@pytest.fixture(scope="module")
def photo_file(tmp_path_factory):
    """A picture of 60x40 pixels, every one its own."""
    file = tmp_path_factory.mktemp("photos") / "noise.png"
    Image.fromarray(np.random.default_rng(0).integers(256, size=(40, 60, 3), dtype=np.uint8)).save(file)
    return str(file)


@pytest.fixture
def hole() -> np.ndarray:
    """Two regions of the picture, far from each other; one is larger than what the model sees."""
    hole = np.zeros((40, 60), bool)
    hole[3:8, 2:9] = hole[15:38, 30:55] = True
    return hole


@pytest.fixture
def warnings(monkeypatch) -> list[str]:
    """What the page tells the user in a toast."""
    told: list[str] = []
    monkeypatch.setattr(gr, "Warning", lambda message, title: told.append(f"{title}: {message}"))
    return told


def pixels(path) -> np.ndarray:
    with Image.open(path) as picture:
        return np.asarray(picture)


def shown_files(gallery) -> list[str]:
    return [item["image"]["path"] for item in gallery.value]


# --- pictures and holes ---


@pytest.mark.parametrize(("height", "width"), [(16, 16), (1, 700), (300, 451), (1200, 40)])
def test_view_keeps_the_aspect_and_magnifies_pixels_to_squares(height, width):
    given = np.random.default_rng(0).integers(256, size=(height, width, 3), dtype=np.uint8)
    shown = editor.view(given)
    assert max(shown.shape) == editor.VIEW and shown.dtype == np.uint8
    for length, before in zip(shown.shape, (height, width), strict=False):
        assert abs(length - before * editor.VIEW / max(height, width)) <= 0.5 or length == 1
    if height == 16:
        assert np.array_equal(shown, given.repeat(32, axis=0).repeat(32, axis=1))


@settings(max_examples=40, deadline=None)
@given(hole=arrays(bool, st.tuples(st.integers(1, 100), st.integers(1, 100))))
def test_a_hole_comes_back_from_the_editor_as_it_was_painted_in(tmp_path_factory, hole):
    file = tmp_path_factory.mktemp("any") / "grey.png"
    Image.new("L", hole.shape[::-1]).save(file)
    value = editor.edited(str(file), hole)
    if hole.any():
        assert np.array_equal(editor.painted_hole(value, hole.shape), hole)
    else:
        assert value["layers"] == []


def test_what_is_transparent_is_painted_already(tmp_path):
    rgba = np.full((20, 30, 4), 255, np.uint8)
    rgba[4:9, 7:20, 3] = 0
    Image.fromarray(rgba).save(tmp_path / "cut.png")
    assert np.array_equal(editor.painted_hole(editor.edited(str(tmp_path / "cut.png")), (20, 30)), rgba[..., 3] == 0)


@pytest.mark.parametrize("value", [None, {"layers": []}, {"layers": [np.zeros((8, 8, 4), np.uint8)]}])
def test_nothing_painted_is_said(value):
    with pytest.raises(ValueError, match="no hole: paint over"):
        editor.painted_hole(value, (8, 8))


def test_layers_may_have_sizes_of_their_own():
    small, large = np.zeros((4, 4, 4), np.uint8), np.zeros((16, 8, 4), np.uint8)
    small[0, 0, 3] = large[8:, 4:, 3] = 255
    hole = editor.painted_hole({"layers": [small, large]}, (8, 8))
    expected = np.zeros((8, 8), bool)
    expected[:2, :2] = expected[4:, 4:] = True
    assert np.array_equal(hole, expected)
    with pytest.raises(ValueError, match=r"layer \(8, 8, 3\): expected \(h, w, 4\), RGBA"):
        editor.painted_hole({"layers": [np.zeros((8, 8, 3), np.uint8)]}, (8, 8))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"model": None}, "model None: expected one of tiny"),
        ({"model": ["tiny"]}, r"model \['tiny'\]: expected one of tiny"),
        *(
            ({"samples": value}, "completions: expected a whole number")
            for value in (0, 1.5, float("nan"), True, "4", 7)
        ),
        *(({"seed": value}, "seed: expected a whole number") for value in (None, -1, 1e308, float("inf"), [1])),
        *(({"grow": value}, "grow: expected a whole number") for value in (None, -1, float("inf"))),
    ],
)
def test_values_that_no_control_sends_are_named(page, photo_file, hole, warnings, change, told):
    *decoding, seed, grow = SETTINGS
    values = {"model": "tiny", "samples": 1, "seed": seed, "grow": grow} | change
    sent = values["model"], values["samples"], *decoding, values["seed"], values["grow"]
    (skipped,) = page.fill(editor.edited(photo_file, hole), photo_file, *sent)
    assert len(skipped) == 5 and re.match(f"Not filled: {told}", warnings[0])


# --- filling ---


def test_completions_are_those_of_fill_photo_whatever_the_batch(page, inpainter, photo_file, hole, monkeypatch):
    monkeypatch.setattr("maskgit.completion.images_at_once", lambda device: 2)
    frames = list(itertools.islice(page.fill(editor.edited(photo_file, hole), photo_file, "tiny", 3, *SETTINGS), 12))
    assert [frame[0].split()[1] for frame in frames] == list("1234" * 3)  # three batches of two rows
    widths = [int(frame[0].split("width: ")[1].split("%")[0]) for frame in frames]
    assert widths == sorted(widths) and widths[-1] == 100
    shown = page.fill(editor.edited(photo_file, hole), photo_file, "tiny", 3, *SETTINGS)
    for _ in range(13):
        last = next(shown)
    photo = read_photo(photo_file, mask=Image.fromarray(~hole))
    expected, _ = fill_photo(inpainter, photo, samples=3, tiling="squares")
    assert np.array_equal([pixels(file) for file in shown_files(last[1])], expected)
    assert len(last[2]) == 4 and len(last[3]) == 3


def test_who_leaves_stops_the_decoding(page, inpainter, photo_file, hole, monkeypatch):
    calls, predict = [], inpainter.predict
    monkeypatch.setattr(inpainter, "predict", lambda tokens: calls.append(1) or predict(tokens))
    shown = page.fill(editor.edited(photo_file, hole), photo_file, "tiny", 1, *SETTINGS)
    _, gallery, film, _, _ = next(shown)
    folder = film[0][0].parent
    assert len(calls) == 1 and folder.is_dir() and len(gallery.value) == 1
    shown.close()
    assert len(calls) == 1 and not folder.exists()


def test_an_error_of_the_networks_reaches_who_iterates(page, inpainter, photo_file, hole, monkeypatch):
    def fail(tokens):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(inpainter, "predict", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        next(page.fill(editor.edited(photo_file, hole), photo_file, "tiny", 1, *SETTINGS))


def test_the_last_thing_shown_is_the_filled_picture_in_its_own_mode(page, photo_file, hole, tmp_path):
    grey = tmp_path / "deep.png"
    deep = np.random.default_rng(1).integers(2**16, size=hole.shape, dtype=np.uint16)
    Image.fromarray(deep).save(grey)
    shown = page.fill(editor.edited(str(grey), hole), str(grey), "tiny", 2, *SETTINGS)
    for step in range(1, 5):
        status, completions, film, maps, save = next(shown)
        assert f"Step {step} of 4" in status and f"width: {25 * step}%" in status
        assert len(completions.value) == 2 and len(film) == step and maps is None and not save.visible
    status, completions, film, maps, save = next(shown)
    files = shown_files(completions)
    assert len(files) == 2
    for file in files:
        filled = pixels(file)
        assert filled.dtype == deep.dtype and np.array_equal(filled[~hole], deep[~hole])
    assert "2 completions in" in status and "deep.png: " in status and str(tmp_path) not in status
    assert len(maps) == 2 and len(film) == 4 and save.label == "Download completion 1"
    assert np.array_equal(pixels(save.value["path"]), pixels(files[0]))
    assert list(shown) == []


def test_the_tiling_is_that_of_the_command_line_or_else_what_the_model_can(inpainter, photo_file, hole):
    settings = editor.edited(photo_file, hole), photo_file, "tiny", 1, *SETTINGS
    *_, last = demo.Page({"tiny": inpainter}).fill(*settings)
    photo = read_photo(photo_file, mask=Image.fromarray(~hole))
    for tiling in ("squares", "windows"):
        *_, told = demo.Page({"tiny": inpainter}, tiling).fill(*settings)
        (expected,), _ = fill_photo(inpainter, photo, tiling=tiling)
        assert np.array_equal(pixels(shown_files(told[1])[0]), expected)
        assert (tiling == "squares") == ("shrunk" in told[0])
        assert np.array_equal(pixels(shown_files(last[1])[0]), expected) == (tiling == "windows")


def test_a_hole_is_grown_and_a_tight_one_told(page, tmp_path, hole):
    thing = np.full((*hole.shape, 3), 60, np.uint8)
    thing[1:10, 0:11] = thing[13:40, 28:57] = 200  # two pixels more than the hole on every side
    Image.fromarray(thing).save(tmp_path / "thing.png")
    texts, changed = [], []
    for grow in (0, 4):
        *_, last = page.fill(editor.edited(str(tmp_path / "thing.png"), hole), str(tmp_path / "thing.png"), "tiny", 1,
                             *SETTINGS[:-1], grow)  # fmt: skip
        texts.append(last[0])
        changed.append((pixels(shown_files(last[1])[0]) != thing).any(axis=2))
    assert ["the hole looks tight" in text for text in texts] == [True, False]
    assert not changed[0][~hole].any() and changed[1][11, 40]


@pytest.mark.parametrize("samples", [1, 6])
def test_seeds_tell_completions_apart(page, photo_file, hole, samples):
    *_, last = itertools.islice(page.fill(editor.edited(photo_file, hole), photo_file, "tiny", samples, *SETTINGS), 5)
    results = [pixels(file) for file in shown_files(last[1])]
    assert len({result.tobytes() for result in results}) == len(results) == samples


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"editor": None}, "no hole: paint over"),
        ({"everywhere": True}, "the mask: the hole is the whole picture"),
        ({"sweet_spot": 5}, "sweet_spot = 5 must be at most total_iter = 4"),
        ({"seed": None}, "seed: expected a whole number from 0"),
        ({"path": "gone"}, "gone: cannot be read as an image"),
    ],
)
def test_what_cannot_be_filled_is_said_in_a_line(page, photo_file, hole, warnings, change, message):
    names = "steps", "sweet_spot", "schedule", "sampler", "temperature", "seed", "grow"
    values = dict(zip(names, SETTINGS, strict=True))
    values |= {"editor": editor.edited(photo_file, hole | change.pop("everywhere", False)), "path": photo_file}
    (shown,) = page.fill(model="tiny", samples=1, **values | change)
    assert len(shown) == 5 and all(value == gr.skip() for value in shown)
    (told,) = warnings
    assert message in told and "\n" not in told


def test_a_text_file_named_png_is_no_picture(page, tmp_path, warnings):
    (tmp_path / "notes.png").write_text("not a picture")
    assert list(page.open(str(tmp_path / "notes.png"))) == [(gr.skip(), gr.skip())]
    assert warnings[0].startswith("No picture: notes.png: cannot be read as an image")
    assert str(tmp_path) not in warnings[0]


@pytest.mark.parametrize("family", ["", *FAMILIES])
def test_ready_made_holes(page, photo_file, family):
    for value in page.ready_made(photo_file, family, 3):
        layers = [pixels(file) for file in value["layers"]]
        assert np.array_equal(pixels(value["background"]), editor.view(pixels(photo_file)))
    if family:
        assert 0.01 < editor.painted_hole({"layers": layers}, (40, 60)).mean() < 0.9
    else:
        assert layers == []


# --- the command line ---


def test_command_line_names_what_is_wrong(inpainter, tmp_path, capsys):
    def error(*arguments) -> str:
        with pytest.raises(SystemExit) as raised:
            demo.main([*map(str, arguments)])
        assert raised.value.code == 2
        return capsys.readouterr().err

    assert "nowhere: expected a folder" in error("--checkpoint", tmp_path / "nowhere")
    assert "--device toaster" in error("--checkpoint", save(tmp_path, vqgan(), transformer()), "--device", "toaster")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert str(port) in error("--checkpoint", tmp_path, "--port", port)


def test_help_names_the_flags(capsys):
    with pytest.raises(SystemExit):
        demo.main(["--help"])
    text = capsys.readouterr().out
    assert all(flag in text for flag in ("--checkpoint", "--host", "--port", "127.0.0.1"))


# --- the page ---


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def serving(models, folder):
    blocks, port = demo.build(models, folder), free_port()
    demo.serve(blocks, "127.0.0.1", port, wait=False)
    yield f"http://127.0.0.1:{port}"
    blocks.close()


@pytest.fixture(scope="module")
def address(inpainter, tmp_path_factory):
    """Where the page with tiny networks is."""
    yield from serving({"tiny": inpainter, "other": inpainter}, tmp_path_factory.mktemp("samples"))


def test_the_page_is_served_without_telemetry_and_from_this_machine_alone(address):
    with urllib.request.urlopen(address) as answer:
        text = answer.read().decode()
    assert "Fill the hole" in text and '"analytics_enabled":false' in text.replace(" ", "")
    with pytest.raises(ConnectionRefusedError):  # another address of this machine
        socket.create_connection(("127.0.0.2", int(address.rpartition(":")[2])), 2)


def answer_of(address: str, name: str, data: list) -> str:
    """What the page's API says to a call of an event."""
    call = urllib.request.Request(
        f"{address}/gradio_api/call/{name}", json.dumps({"data": data}).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(call) as answer:
        number = json.load(answer)["event_id"]
    with urllib.request.urlopen(f"{address}/gradio_api/call/{name}/{number}") as answer:
        return answer.read().decode()


@pytest.mark.parametrize(("number", "value"), [(0, "editor"), (1, "no model"), (2, "many"), (2, None), (7, "nought")])
def test_the_api_says_what_is_wrong(address, number, value):
    data = [{"background": None, "layers": [], "composite": None}, "tiny", 1, *SETTINGS]
    data[number] = value
    text = answer_of(address, "fill", data)
    assert "event: error" in text and '"error": null' not in text and "data: null" not in text, text


def test_no_answer_names_a_path_of_the_server(address):
    """A file of the server's in place of an upload is refused, as is what is no picture."""
    theirs = {"path": "demo.py", "meta": {"_type": "gradio.FileData"}}
    for layers in ([theirs], [theirs, theirs]):
        editor = {"background": None, "layers": layers, "composite": None}
        text = answer_of(address, "fill", [editor, "tiny", 1, *SETTINGS])
        assert "event: error" in text and "a value that the page does not send" in text, text
        assert str(demo.Path(demo.__file__).parent) not in text and "/tmp" not in text


# --- the page, in a browser ---

CHROMIUM = shutil.which("chromium")
QUIET = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run"]
PATIENCE = 180_000  # in ms: without a GPU the editor draws slowly
WIDE, PHONE = {"width": 1440, "height": 900}, {"width": 390, "height": 844}


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: make test-demo")
    if not CHROMIUM:
        pytest.skip("there is no chromium: apt-get install chromium")
    with playwright.sync_playwright() as engine:
        running = engine.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        yield running
        running.close()


WATCH_STATUS = """() => {  // what it says may pass too quickly to be waited for
  const status = document.querySelector("#status");
  window.shown = [];
  new MutationObserver(() => window.shown.push(status.textContent))
    .observe(status, {childList: true, subtree: true, characterData: true});
}"""


class Visitor:
    """Somebody at the page, and what went wrong there: errors of the console, requests to other hosts."""

    def __init__(self, browser, address: str, viewport: dict = WIDE):
        self.wrong: list[str] = []
        self.page = browser.new_context(viewport=viewport).new_page()
        self.page.set_default_timeout(PATIENCE)
        self.page.on("console", lambda message: message.type == "error" and self._note(message.text))
        self.page.on("requestfailed", lambda r: "ABORTED" in r.failure or self.wrong.append(f"{r.failure}: {r.url}"))
        self.page.on("pageerror", lambda error: self.wrong.append(str(error)))
        self.page.on("request", lambda request: self._check(request.url, address))
        self.page.goto(address)
        self.page.wait_for_selector("#editor canvas")
        self.settle()

    def _note(self, text: str) -> None:
        if text != "No draw texture found for layer":  # Gradio's editor, of a layer that it has replaced meanwhile
            self.wrong.append(text)

    def _check(self, url: str, address: str) -> None:
        if not url.startswith((address, "data:", "blob:")):
            self.wrong.append(f"request to {url}")

    def settle(self) -> None:
        self.page.wait_for_timeout(1500)  # until the editor has drawn a picture and fitted it into its frame

    def wait_for_editor(self, action) -> None:
        """Until the editor has fetched and drawn what `action` changed."""
        with self.page.expect_response(lambda answer: "/file=" in answer.url):
            action()
        self.settle()

    def upload(self, file) -> None:
        with self.page.expect_file_chooser() as chooser:
            self.page.get_by_text("Upload a picture").click()
        chooser.value.set_files(str(file))

    def paint(self, across: float = 60) -> None:
        """A stroke of `across` pixels to both sides of the middle."""
        box = self.page.locator("#editor canvas").first.bounding_box()
        x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
        self.page.mouse.move(x - across, y)
        self.page.mouse.down()
        self.page.mouse.move(x + across, y, steps=3)
        self.page.mouse.up()
        self.page.wait_for_timeout(300)

    def press(self) -> None:
        self.page.get_by_role("button", name="Fill", exact=True).click()

    def result(self) -> np.ndarray:
        """The first completion, once it is there."""
        save = self.page.get_by_role("button", name="Download completion 1")
        save.wait_for()
        with self.page.expect_download() as download:
            save.click()
        return pixels(download.value.path())

    def count(self, gallery: str) -> int:
        return self.page.locator(f"#{gallery} .thumbnail-item").count()

    def leave(self) -> None:
        self.page.context.close()
        assert self.wrong == []


@pytest.mark.parametrize("viewport", [WIDE, PHONE], ids=["wide", "phone"])
def test_an_uploaded_picture_keeps_what_was_not_painted(browser, address, photo_file, viewport):
    visitor = Visitor(browser, address, viewport)
    assert visitor.page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    visitor.wait_for_editor(lambda: visitor.upload(photo_file))
    visitor.paint()
    visitor.press()
    given, filled = pixels(photo_file), visitor.result()
    changed = (given != filled).any(axis=2)
    rows, columns = np.nonzero(changed)
    assert filled.shape == given.shape and 0.02 < changed.mean() < 0.3
    assert rows.min() > 5 and rows.max() < 35 and columns.min() > 5 and columns.max() < 55  # the stroke, and no more
    visitor.leave()


def test_a_text_file_and_a_missing_hole_are_said(browser, address, tmp_path):
    (tmp_path / "notes.png").write_text("not a picture")
    visitor = Visitor(browser, address)
    visitor.upload(tmp_path / "notes.png")
    visitor.page.get_by_text("notes.png: cannot be read as an image").wait_for()
    visitor.press()
    visitor.page.get_by_text("no hole: paint over what should be filled").wait_for()
    visitor.paint()
    visitor.press()
    assert visitor.result().shape == (512, 512, 3)  # the sample is still there
    visitor.leave()


def test_two_people_at_once_get_each_their_own(browser, address, photo_file):
    first, second = Visitor(browser, address, PHONE), Visitor(browser, address, PHONE)
    second.wait_for_editor(lambda: second.upload(photo_file))
    for visitor in (first, second):
        visitor.paint()
    for visitor in (first, second):
        visitor.press()
    assert (second.result().shape, first.result().shape) == ((40, 60, 3), (512, 512, 3))
    for visitor in (first, second):
        visitor.leave()


def test_the_shipped_weights_fill_a_sample_step_by_step(browser, tmp_path):
    models = {folder.name: Inpainter.from_pretrained(folder, "cpu") for folder in (PHOTOS, CATS)}
    for address in serving(models, tmp_path):
        visitor = Visitor(browser, address)
        visitor.wait_for_editor(visitor.page.locator("#samples .thumbnail-item").nth(2).click)
        visitor.page.locator("#model input").click()
        visitor.page.get_by_role("option", name="cats64").click()
        visitor.page.locator("#family input").click()
        visitor.wait_for_editor(visitor.page.get_by_role("option", name="thick").click)
        visitor.page.evaluate(WATCH_STATUS)
        visitor.press()
        given, filled = pixels(tmp_path / "face.png"), visitor.result()
        shown = visitor.page.evaluate("window.shown")
        assert any(f"Completion 2 of 4: step {step}" in text for text in shown for step in range(1, 10)), shown
        hole = np.asarray(make_holes("thick", 1)[0, 0])
        assert np.array_equal(given[~hole], filled[~hole]) and (given[hole] != filled[hole]).any()
        assert visitor.count("completions") == 4
        hidden = models["cats64"].hide(make_holes("thick", 1), rule="majority")
        film = int(iterations(hidden, models["cats64"].decoding)[0])
        for tab, gallery, count in (("Steps", "film", film), ("Confidence", "maps", 4)):
            visitor.page.get_by_role("tab", name=tab).click()
            assert visitor.count(gallery) == count
        visitor.page.get_by_role("tab", name="Completions").click()
        visitor.page.locator("#completions .thumbnail-item").nth(2).click()
        visitor.page.get_by_role("button", name="Download completion 3").wait_for()
        visitor.page.get_by_role("button", name="Clear", exact=True).click()
        visitor.settle()
        visitor.press()
        visitor.page.get_by_text("no hole: paint over what should be filled").wait_for()
        visitor.leave()
