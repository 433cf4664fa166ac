"""A page to play with: paint a hole into a picture, and watch the model fill it.

    python demo.py                                   # http://127.0.0.1:7860, for this machine alone
    python demo.py --checkpoint checkpoints/cats64 --host 0.0.0.0 --port 8000
    python demo.py --checkpoint checkpoints/mine pretrained/photos64    # a choice of two

The browser gives only the hole: the picture stays on the server as its file is, so known pixels come back untouched.
Uploads and results lie in Gradio's folder of temporary files for a day at most.
"""

if __name__ == "__main__":
    import interrupts

    interrupts.in_one_line()

import argparse
import html
import logging
import os
import re
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import gradio as gr
import numpy as np
from PIL import Image

from config import add_flag
from interrupts import run_script
from maskgit.data import write_image
from maskgit.decoding_config import AUTO, SAMPLERS, STEPS, DecodingConfig
from maskgit.inpainter import CATS, PHOTOS, Inpainter
from maskgit.masks import FAMILIES, SCHEDULES, make_holes
from photos.editor import PAINT, VIEW, edited, painted_hole, sample_files
from photos.fill import TILINGS, usual_tiling
from photos.image_file import read_image_file
from photos.photo import Photo, grown, read_photo, write_photo
from photos.tight import tight_notes
from photos.watch import WATCHED, Turns, WatchedSquares, WatchedWindows
from utils import log, one_line, start_logging

HEIGHT = "min(560px, 100vw - 40px)"  # of what lies side by side, or on a phone one below the other
READY_MADE = "Ready-made hole"
MOST = 6  # completions
GROWN = 32  # pixels that a hole is grown by, at most
AT_ONCE = 8  # people whose holes are filled, in turns
QUEUE = 32  # people waiting
SESSIONS = 500  # whose pictures are remembered: some 90 KB each
DAY = 24 * 60 * 60  # in seconds
THEME = gr.themes.Default(primary_hue="pink", neutral_hue="zinc", font=["system-ui", "sans-serif"],
                          font_mono=["ui-monospace", "monospace"])  # fmt: skip
CSS = """
main.contained, .gradio-container > .main { max-width: 1480px; margin: auto; padding-top: 12px; }
#title h1 { margin: 0; }
#status { min-height: 4em; line-height: 1.5; }
#status .bar { height: .5em; margin-top: .5em; border-radius: .25em; background: var(--primary-500); }
#editor [title="Clear canvas"] { display: none; }  /* it would take the picture away too */
#samples .grid-wrap { padding: 0; overflow: hidden; }
#samples .grid-container { grid-template-columns: repeat(3, 76px) !important; grid-template-rows: 76px !important; }
#film .grid-container { grid-template-columns: repeat(auto-fill, minmax(100px, 1fr)) !important; }
.caption-label { font-size: .7rem !important; padding: 0 .4em !important; opacity: .8; }
.small img { image-rendering: pixelated; }
"""


# --- pictures and holes ---


def a_whole(name: str, value, least: int = 0, most: int = 2**63 - 1) -> int:
    """`value`, which a control or a program sent, as an integer. Raises ValueError unless it is one in the range."""
    if isinstance(value, bool) or not isinstance(value, int | float) or value != value or not least <= value <= most:
        raise ValueError(f"{name}: expected a whole number from {least} to {most}, found {str(value)[:40]}")
    if value != int(value):
        raise ValueError(f"{name}: expected a whole number, found {value}")
    return int(value)


def plain(error: Exception | str, path: str) -> str:
    """A message in one line, with the file named as its owner knows it."""
    return str(error).replace(f"{Path(path).parent}{os.sep}", "").replace("\n", "; ")


# --- the page ---


class Blocks(gr.Blocks):
    """Gradio's, which says nothing of the server where a program sends what the page would not."""

    async def preprocess_data(self, *given, **options):
        try:
            return await super().preprocess_data(*given, **options)
        except gr.Error as error:
            raise plain_error(error) from error
        except Exception as error:
            log.info(f"refused: {one_line(error)}")
            raise gr.Error("a value that the page does not send: see the types in /gradio_api/info") from error


def plain_error(error: gr.Error) -> gr.Error:
    """What a control of Gradio's refuses, without a path of the server's."""
    return gr.Error(re.sub(r"\S*/\S*", "the file", str(error.message)), title=error.title)


class Page:
    """What the page's events do; the models, by name, serve everybody, a session has a picture and its hole.

    tiling: as of `fill_photo`
    """

    def __init__(self, models: dict[str, Inpainter], tiling: str | None = None):
        self.models, self.tiling, self.turns = models, tiling, Turns()

    def open(self, path: str) -> Iterator[tuple[str, dict]]:
        """A picture file -> the session's picture, the editor's value."""
        try:
            value = edited(path)
        except ValueError as error:
            gr.Warning(plain(error, path), title="No picture")
            yield gr.skip(), gr.skip()
            return
        for shown in self.shown(value):
            yield path, shown

    def show(self, path: str, hole: np.ndarray | None = None) -> Iterator[dict]:
        """Yields what `edited` gives of the session's picture; one that is gone, a day old, is told."""
        try:
            value = edited(path, hole)
        except ValueError as error:
            gr.Warning(plain(error, path), title="No picture")
            yield gr.skip()
            return
        yield from self.shown(value)

    def shown(self, value: dict) -> Iterator[dict]:
        """Yields an editor's value, its pictures in files that last until the next call.

        Gradio would write arrays anew while browsers read them; files it copies once.
        """
        with tempfile.TemporaryDirectory() as folder:
            background, layers = (
                [str(file) for file, _ in written(f"{folder}/{name}", pictures)]
                for name, pictures in (("picture", [value["background"]]), ("hole", value["layers"]))
            )
            yield {"background": background[0], "layers": layers, "composite": None}

    def ready_made(self, path: str, family: str, seed: float) -> Iterator[dict]:
        """A hole of `family`, "" for none -> the editor's value."""
        hole = make_holes(family, 1, seed=a_whole("seed", seed or 0))[0, 0].numpy() if family in FAMILIES else None
        yield from self.show(path, hole)

    def fill(
        self, editor, path, model, samples, steps, sweet_spot, schedule, sampler, temperature, seed, grow
    ) -> Iterator[tuple]:
        """Yields what status, completions, steps, confidence maps and download show, after every iteration.

        The decoding goes on only while somebody asks for more: it ends where this generator is closed.
        """
        try:
            if not isinstance(model, str) or model not in self.models:
                raise ValueError(f"model {model}: expected one of {', '.join(self.models)}")
            samples, seed = a_whole("completions", samples, 1, MOST), a_whole("seed", seed)
            grow, inpainter = a_whole("grow", grow, 0, GROWN), self.models[model]
            file = read_image_file(path)
            hole = painted_hole(editor, file.rgb().shape[:2])
            photo = grown(read_photo(file, mask=Image.fromarray(np.where(hole, 0, 255).astype(np.uint8))), grow)
            total, stop = (steps, sweet_spot) if steps else (AUTO, None)
            decoding = inpainter.decoding.changed(
                total_iter=total, sweet_spot=stop, mask_func=schedule, sampler=sampler, temperature=temperature
            )
            tiling = self.tiling or usual_tiling(inpainter)
            filling = WATCHED[tiling](inpainter, photo, seed, samples, decoding)
        except ValueError as error:
            gr.Warning(plain(error, path), title="Not filled")
            yield tuple(gr.skip() for _ in range(5))
            return
        with tempfile.TemporaryDirectory() as folder:
            yield from self._watch(filling, Path(folder) / Path(path).stem, photo, samples)

    def _watch(
        self, filling: WatchedSquares | WatchedWindows, stem: Path, photo: Photo, samples: int
    ) -> Iterator[tuple]:
        """Yields what `fill` does; the pictures are files, as in `show`, whose names begin with `stem`."""
        start, film = time.perf_counter(), []
        columns = 1 if samples == 1 else 2 if samples in (2, 4) else 3
        for share, told, first in self.turns.each(filling.steps()):
            film[first - 1 :] = written(f"{stem}_film", filling.film(first), first=first)
            bar = f"<div class='bar' style='width: {share:.0%}'></div>"
            gallery = gr.Gallery(written(f"{stem}_now", filling.pictures()), columns=columns, selected_index=None)
            yield f"<div>{told}{bar}</div>", gallery, film, None, gr.DownloadButton(visible=False)
        notes = [*photo.notes, *tight_notes(photo), *filling.notes()]

        def keep(file: Path, pixels: np.ndarray) -> None:
            notes.extend(write_photo(file, photo, pixels))

        shown = written(f"{stem}_filled", filling.completions(), keep)
        seconds, share = time.perf_counter() - start, photo.hole.mean()
        lines = [f"{samples} completion{'s' * (samples > 1)} in {seconds:.1f} s, {share:.0%} of the picture"]
        lines += dict.fromkeys(plain(note, photo.name) for note in notes)
        gallery = gr.Gallery(shown, elem_classes=["small"] if max(photo.hole.shape) < VIEW // 2 else [])
        maps = written(f"{stem}_confidence", filling.maps())
        yield "<br>".join(map(html.escape, lines)), gallery, film, maps, download(shown[0][0], 1)

    def save(self, completions, event: gr.SelectData) -> gr.DownloadButton:
        """The completion that was clicked is the one to download."""
        return download(completions[event.index][0], event.index + 1)


def written(stem: str, pictures: list[np.ndarray], write=write_image, first: int = 1) -> list[tuple[Path, str]]:
    """Writes the pictures stem_FIRST.png, ...: what a gallery shows."""
    files = [Path(f"{stem}_{number}.png") for number in range(first, first + len(pictures))]
    for file, picture in zip(files, pictures, strict=True):
        write(file, picture)
    return [(file, f"{number}") for number, file in enumerate(files, first)]


def download(file, number: int) -> gr.DownloadButton:
    return gr.DownloadButton(f"Download completion {number}", value=str(file), visible=True)


def ways(decoding: DecodingConfig) -> list:
    """What the controls show that a model has its own values of: steps, sweet spot, schedule, sampler, temperature."""
    total = 0 if decoding.total_iter == AUTO else decoding.total_iter
    return [
        gr.Slider(0, 32, total, step=1, label="Steps (0: as many as the hole needs)"),
        gr.Slider(1, total or STEPS, decoding.stop or STEPS, step=1, label="Sweet spot"),
        gr.Dropdown(list(SCHEDULES), value=decoding.mask_func, label="Schedule"),
        gr.Dropdown(list(SAMPLERS), value=decoding.sampler, label="Sampler"),
        gr.Slider(0, 10, decoding.temperature, step=0.1, label="Temperature"),
    ]


def build(models: dict[str, Inpainter], folder: Path, tiling: str | None = None) -> gr.Blocks:
    """The page, with a choice of `models`, the first of them chosen; `folder` is where its sample pictures are written.

    tiling: as of `fill_photo`
    """
    usual = next(iter(models.values()))
    page, samples = Page(models, tiling), sample_files(folder, usual.size)
    shown = {"show_label": False, "format": "png", "height": HEIGHT, "object_fit": "contain", "interactive": False}
    with Blocks(
        title="maskgit-inpainting", analytics_enabled=False, delete_cache=(DAY, DAY), fill_width=True
    ) as blocks:
        gr.Markdown("# Fill the hole\nPaint over a part of a picture: a transformer fills it in, token by token.",
                    elem_id="title")  # fmt: skip
        path = gr.State(samples[0])
        with gr.Row():
            with gr.Column(scale=5, min_width=320):
                with gr.Row(equal_height=True):
                    chooser = gr.Gallery(
                        samples, columns=3, height=76, allow_preview=False, buttons=[], show_label=False, scale=2,
                        container=False, min_width=240, interactive=False, object_fit="contain", elem_id="samples",
                    )  # fmt: skip
                    with gr.Column(scale=1, min_width=140):
                        upload = gr.UploadButton("Upload a picture", file_types=["image"], size="sm")
                        family = gr.Dropdown(
                            [(READY_MADE, ""), *FAMILIES], value="", show_label=False, container=False, elem_id="family"
                        )
                editor = gr.ImageEditor(
                    edited(samples[0]), label="Paint the hole", sources=(), transforms=(), layers=False, buttons=[],
                    brush=gr.Brush(28, [f"rgb{PAINT}"], color_mode="fixed"), eraser=gr.Eraser(28), format="png",
                    canvas_size=(VIEW, VIEW), height=HEIGHT, elem_id="editor",
                )  # fmt: skip
                with gr.Row():
                    clear = gr.Button("Clear", scale=1, min_width=80)
                    fill = gr.Button("Fill", variant="primary", scale=4, min_width=160)
            with gr.Column(scale=5, min_width=320):
                status = gr.HTML(elem_id="status")
                with gr.Tabs():
                    with gr.Tab("Completions"):
                        completions = gr.Gallery(buttons=["download", "fullscreen"], elem_id="completions", **shown)
                    with gr.Tab("Steps"):
                        film = gr.Gallery(buttons=["fullscreen"], columns=4, elem_id="film", **shown)
                    with gr.Tab("Confidence"):
                        maps = gr.Gallery(buttons=["download", "fullscreen"], columns=2, elem_id="maps", **shown)
                save = gr.DownloadButton("Download", visible=False)
            with gr.Column(scale=2, min_width=240):
                model = gr.Dropdown(list(models), label="Model", visible=len(models) > 1, elem_id="model")
                count = gr.Slider(1, MOST, 4, step=1, label="Completions")
                own = ways(usual.decoding)
                seed = gr.Number(0, precision=0, minimum=0, label="Seed")
                grow = gr.Slider(0, GROWN, 0, step=1, label="Grow the hole (pixels)")
        settings = [model, count, *own, seed, grow]
        quick = {"show_progress": "hidden", "concurrency_limit": None}

        def choose(event: gr.SelectData):
            yield from page.open(samples[event.index])

        chooser.select(choose, None, [path, editor], **quick)
        upload.upload(page.open, upload, [path, editor], **quick)
        clear.click(page.show, path, editor, **quick)
        family.input(page.ready_made, [path, family, seed], editor, **quick)
        model.input(lambda name: ways(models.get(name, usual).decoding), model, own, **quick)
        steps, sweet_spot, *_ = own
        steps.release(lambda most: gr.Slider(maximum=most or STEPS, value=most or STEPS), steps, sweet_spot, **quick)
        completions.select(page.save, completions, save, **quick)
        fill.click(
            page.fill, [editor, path, *settings], [status, completions, film, maps, save],
            show_progress="minimal", show_progress_on=[completions], concurrency_limit=AT_ONCE,
        )  # fmt: skip
    return blocks.queue(max_size=QUEUE)


def serve(blocks: gr.Blocks, host: str, port: int, wait: bool = True) -> None:
    """Serves the page until interrupted, or, unless it shall `wait`, in the background. Raises OSError: port in use."""
    blocks.launch(
        server_name=host, server_port=port, prevent_thread_lock=not wait, share=False, quiet=True, ssr_mode=False,
        theme=THEME, css=CSS, footer_links=[], run_history=False, max_file_size="50mb", enable_monitoring=False,
        show_error=True, state_session_capacity=SESSIONS,
    )  # fmt: skip


def names(folders: list[Path]) -> list[str]:
    """What a visitor reads: the last parts of the folders, or all of their paths where two of these are equal."""
    short = [folder.resolve().name for folder in folders]
    return short if len(set(short)) == len(short) else [str(folder) for folder in folders]


def main(argv: list[str] | None = None) -> None:
    """The command line; see --help."""
    start_logging()
    logging.getLogger("httpx").setLevel(logging.WARNING)  # with which Gradio asks itself whether it is there
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    add_flag(parser, "--checkpoint", default=[PHOTOS, CATS], nargs="+", metavar="DIR", type=Path,
             help="folders with vqgan.safetensors and transformer.safetensors, to choose from "
             "(default: pretrained/photos64 and pretrained/cats64)")  # fmt: skip
    parser.add_argument("--tiling", choices=TILINGS, help="as of inpainting.py --image")
    add_flag(
        parser, "--host", default="127.0.0.1", help="0.0.0.0: every machine that reaches this one (default: 127.0.0.1)"
    )
    add_flag(parser, "--port", type=int, default=7860, help="default: 7860")
    add_flag(parser, "--device", default="auto", help="auto, cpu, cuda, cuda:1, ... (default: auto)")
    args = parser.parse_args(argv)
    if not 1 <= args.port <= 65535:
        parser.error(f"--port {args.port}: expected 1 to 65535")
    with tempfile.TemporaryDirectory() as folder:
        try:
            models = {
                name: Inpainter.from_pretrained(path, args.device)
                for name, path in zip(names(args.checkpoint), args.checkpoint, strict=True)
            }
            blocks = build(models, Path(folder), args.tiling)
            log.info(f"http://{args.host}:{args.port} (Ctrl-C ends it)")
        except (ValueError, OSError) as error:
            parser.error(str(error))
        try:
            serve(blocks, args.host, args.port)
        except OSError as error:
            parser.error(f"--host {args.host} --port {args.port}: in use, or no address of this machine ({error})")


if __name__ == "__main__":
    run_script(main)
