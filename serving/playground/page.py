"""The playground page: Gradio components and their handlers, over the synchronous client."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from models.image_names import SUFFIXES, has_image_suffix, is_passed_over
from serving.client.sync_client import Client
from serving.playground import answers
from serving.playground.answers import SHOWN, parse_own_prior, thumbnail
from serving.playground.extras import parse_extras
from serving.shared.errors import ServingError
from serving.shared.terminal import counted

if TYPE_CHECKING:
    import gradio

MAX_IMAGE = 16 * 1024 * 1024  # bytes of one upload
MAX_FILES = 2000  # of a batch
STYLE = Path(__file__).with_name("page.css")
OWN = "e.g. cat: 3, dog: 1; press Enter"
MAX_SAMPLES = 24


def find_samples(folder: Path) -> list[Path]:
    """Return the first MAX_SAMPLES images of a folder, sorted by name; an empty list for a missing folder."""
    paths = sorted(
        path
        for path in folder.glob("*")
        if has_image_suffix(path) and not is_passed_over(Path(path.name)) and path.is_file()
    )
    return paths[:MAX_SAMPLES]


def build(client: Client, samples: Sequence[Path] = (), segments: bool = False) -> gradio.Blocks:
    """Build the page. samples: sample images to click. No request is sent before a user action.

    segments: the server has class maps; the page has a tab with their overlays in place of the tabs of classification.
    """
    import gradio as gr

    with gr.Blocks(title="Tailor playground", analytics_enabled=False) as page:
        gr.HTML(f"<h1>Tailor playground</h1><p>One image under several class priors. Server: {escape(client.url)}</p>")
        with gr.Tab("Class map" if segments else "One image"):
            _one_image(gr, client, samples, segments)
        if not segments:
            with gr.Tab("Many images"):
                _many_images(gr, client)
    return page


def _one_image(gr: Any, client: Client, samples: Sequence[Path], segments: bool) -> None:
    invitation = f"<p>Drop an image to {'segment' if segments else 'classify'} it.</p>"
    with gr.Row():
        with gr.Column(scale=1, min_width=280):
            upload = gr.File(label="Image", file_types=sorted(SUFFIXES), type="filepath", elem_id="image")
            if samples:
                gallery = gr.Gallery(
                    [str(path) for path in samples], label="Or click a sample image", columns=2, height=220,
                    allow_preview=False, elem_id="samples",
                )  # fmt: skip
            preview = gr.HTML(elem_id="preview")
            strength = gr.Slider(0, 2, 0.5, step=0.05, label="Strength: 0 is balanced, 1 is train", elem_id="strength")
            own = gr.Textbox(
                label="Your own prior: a weight for each class", placeholder=OWN, lines=1, max_lines=8, elem_id="own"
            )
            more = [] if segments else _more_inputs(gr)
        with gr.Column(scale=3, min_width=320):
            columns = gr.HTML(invitation, elem_id="answers")

    def answer(path: str | None, strength: float, own: str, *more: Any) -> tuple[str, str]:
        if path is None:
            return invitation, ""
        name = Path(path).name
        try:
            data = Path(path).read_bytes()
            extras = parse_extras(*more) if more else None
            results = answers.side_by_side(client, data, strength, own, extras, segments)
        except ServingError as error:
            return f'<p class="wrong" role="alert">{escape(name)}: {escape(str(error))}</p>', ""
        return answers.as_html(results, data), f"{thumbnail(data, name)}<p>{escape(name)}, {len(data):,} bytes</p>"

    outputs = [columns, preview]
    call = {"fn": answer, "inputs": [upload, strength, own, *more], "outputs": outputs, "api_visibility": "private"}
    upload.change(**call, show_progress="minimal")
    if samples:

        def choose(event: gradio.SelectData) -> str:
            return str(samples[event.index])

        # Gradio needs the class in the annotation to pass the event; with the lazy import it would be a string.
        choose.__annotations__["event"] = gr.SelectData
        gallery.select(choose, None, upload, show_progress="hidden", api_visibility="private")
    strength.release(**call, show_progress="hidden")
    strength.change(**call, show_progress="hidden", trigger_mode="always_last")
    own.submit(**call, show_progress="hidden")
    own.blur(**call, show_progress="hidden")
    for text in more[:-1]:
        text.submit(**call, show_progress="hidden")
        text.blur(**call, show_progress="hidden")
    for box in more[-1:]:
        box.change(**call, show_progress="hidden")


def _more_inputs(gr: Any) -> list[Any]:
    """Inputs of parse_extras, in its order, in a closed accordion; all are off."""
    labels = {
        "coverage": "Coverage of the set of classes, e.g. 0.9",
        "level": "Probability of a node of the taxonomy, e.g. 0.9",
        "ask": "Price of asking a person; a wrong class costs 1",
        "false-alarms": "False alarms of unknown images, e.g. 0.05",
    }
    with gr.Accordion("More in an answer", open=False, elem_id="more"):
        texts = [gr.Textbox(label=label, max_lines=1, elem_id=name) for name, label in labels.items()]
        return [*texts, gr.Checkbox(label="Explain the best class", elem_id="explain")]


def _many_images(gr: Any, client: Client) -> None:
    files = gr.File(label="Folder of images", file_count="directory", type="filepath", elem_id="folder")
    prior = gr.Textbox("balanced", label="Prior: balanced, train, live, a strength, or your own", elem_id="prior")
    start = gr.Button("Classify", variant="primary", elem_id="classify")
    summary = gr.HTML(elem_id="summary")
    table = gr.File(label="Answers as CSV", interactive=False, elem_id="csv")
    rows = gr.HTML(elem_id="rows")

    def classify(paths: list[str] | None, prior: str, progress: Any = gr.Progress()) -> tuple[str, str | None, str]:  # noqa: B008
        images = [Path(path) for path in paths or [] if has_image_suffix(Path(path))]
        if not images or len(images) > MAX_FILES:
            message = f"{counted(len(images), 'image')}; expected 1 to {MAX_FILES:,} JPEG, PNG or WebP files"
            return f'<p class="wrong" role="alert">{message}</p>', None, ""
        progress(0.1, desc=counted(len(images), "image"))
        plain = prior.strip()
        try:
            own = plain[:1] in ("[", "{") or ":" in plain or "," in plain
            batch = answers.classify_batch(client, images, parse_own_prior(plain) if own else plain or None)
        except ServingError as error:
            return f'<p class="wrong" role="alert">{escape(str(error))}</p>', None, ""
        more = f"; the first {SHOWN:,} are shown, the CSV has all" if len(images) > SHOWN else ""
        done = f"<p>{len(images) - batch.failed:,} classified, {batch.failed:,} failed{more}</p>"
        return done, str(batch.csv), answers.batch_table(batch)

    call = {"fn": classify, "inputs": [files, prior], "outputs": [summary, table, rows], "api_visibility": "private"}
    start.click(**call)
    prior.submit(**call)


def launch_options() -> dict[str, Any]:
    """Options of Gradio's launch: loopback only, limited upload size, system fonts, no external resources."""
    import gradio as gr

    fonts = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}
    return {
        "server_name": "127.0.0.1",
        "share": False,
        "max_file_size": MAX_IMAGE,
        "theme": gr.themes.Base(primary_hue="indigo", **fonts),
        "css_paths": STYLE,
        "footer_links": [],
        "quiet": True,
        "ssr_mode": False,
        "strict_cors": True,
    }
