"""The page: what is on it, and what happens when somebody uses it."""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections import defaultdict
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import gradio as gr
from PIL import Image

from controlrt.runtime.errors import ControlRTError
from controlrt.runtime.fitting import Resize
from controlrt.runtime.server.jobs import Job, Service
from controlrt.runtime.server.log import log
from controlrt.runtime.server.settings import Settings
from controlrt.runtime.server.ui.choices import Choices, differences, parse_size, sizes
from controlrt.runtime.server.ui.control_picture import (
    OFFERED,
    annotator_for,
    control_picture,
    example_outline,
)
from controlrt.runtime.server.ui.drawing import (
    error_line,
    message,
    preview_of,
    progress_line,
    result_line,
    submit_all,
    watch_all,
)
from controlrt.runtime.server.ui.parameters import ParameterFields
from controlrt.runtime.server.ui.setting_fields import SettingFields
from controlrt.runtime.server.ui.snippets import curl_code, python_code

PROMPT = "a red star on a light blue background"
KEPT = 24
"""Pictures that the gallery shows, the newest first."""
NO_CONTROL = "(prompt alone)"
_RESIZES: tuple[Resize, ...] = ("crop", "pad", "fill", "stretch")
_PRIVATE = {"api_visibility": "private", "show_progress": "hidden"}
_UNEXPECTED = "an unexpected error; the server's log says more"


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """A picture of the gallery."""

    choices: Choices
    control: Image.Image | None
    picture: Image.Image
    caption: str


class Page:
    """The page of one server. ``blocks`` is what Gradio serves.

    Args:
        service: what draws.
        settings: the server's limits.
    """

    def __init__(self, service: Service, settings: Settings) -> None:
        self.service, self._settings = service, settings
        self._running: defaultdict[str, list[Job]] = defaultdict(list)
        """Jobs of every open page, by its session."""
        with gr.Blocks(analytics_enabled=False, title="controlrt", delete_cache=(600, 7200), fill_width=True) as blocks:
            self.blocks = blocks
            self._lay_out()
            self._connect()
        blocks.queue(default_concurrency_limit=None)

    # what is on it

    def _lay_out(self) -> None:
        bundles = list(self.service.bundles)
        manifest = self.service.bundles[bundles[0]]
        controls = [control.name for control in manifest.controls]
        gr.Markdown("# controlrt\nDraw a closed outline or upload a picture, say what it shall be, and draw.")
        with gr.Row():
            with gr.Column(scale=5, min_width=420):
                self._lay_out_control(bundles, controls)
            with gr.Column(scale=6, min_width=420):
                self._lay_out_drawing()
        with gr.Tabs():
            with gr.Tab("Gallery"):
                self.gallery = gr.Gallery(
                    show_label=False,
                    columns=8,
                    height=260,
                    format="jpeg",
                    buttons=["download", "fullscreen"],
                    elem_id="gallery",
                    interactive=False,
                )
            with gr.Tab("As Python"):
                self.python = gr.Code(language="python", show_label=False, elem_id="python", interactive=False)
            with gr.Tab("As curl"):
                self.curl = gr.Code(language="shell", show_label=False, elem_id="curl", interactive=False)
        self.history = gr.State([], time_to_live=7200)

    def _lay_out_control(self, bundles: Sequence[str], controls: Sequence[str]) -> None:
        manifest = self.service.bundles[bundles[0]]
        width, height = manifest.profile.default_size
        first = _first_control(controls)
        annotator = annotator_for(manifest.controls[controls.index(first)]) if first in controls else "none"
        with gr.Row():
            self.bundle = gr.Dropdown(list(bundles), value=bundles[0], label="bundle", visible=len(bundles) > 1)
            self.control = gr.Dropdown([*controls, NO_CONTROL], value=first, label="control", elem_id="control")
            self.size = gr.Dropdown(
                sizes(manifest.profile), value=f"{width}x{height}", label="size", allow_custom_value=True
            )
        outline = example_outline(width, height)
        with gr.Tabs():
            with gr.Tab("Draw") as self.draw_tab:
                self.editor = gr.ImageEditor(
                    value={"background": None, "layers": [outline], "composite": outline},
                    type="pil",
                    image_mode="RGBA",
                    sources=(),
                    transforms=(),
                    layers=False,
                    canvas_size=(width, height),
                    fixed_canvas=True,
                    brush=gr.Brush(
                        default_size=max(2, min(width, height) // 64),
                        colors=["#000000"],
                        default_color="#000000",
                        color_mode="fixed",
                    ),
                    show_label=False,
                    height=460,
                    elem_id="editor",
                )
                self.fill_drawn = gr.Checkbox(True, label="fill closed outlines", elem_id="fill")
            with gr.Tab("Upload") as self.upload_tab:
                self.upload = gr.Image(
                    type="pil",
                    image_mode="RGBA",
                    sources=["upload", "clipboard"],
                    show_label=False,
                    height=460,
                    elem_id="upload",
                )
                self.fill_uploaded = gr.Checkbox(False, label="fill closed outlines")
        self.source = gr.State("draw")
        with gr.Row():
            self.annotator = gr.Dropdown(
                list(OFFERED),
                value=annotator,
                label="annotator",
                info="makes the control; none for a picture that is one already",
                elem_id="annotator",
            )
            self.resize = gr.Dropdown(_RESIZES, value=_RESIZES[0], label="fit", info="of a picture of another size")
        with gr.Accordion("Annotator's parameters", open=False):
            self.parameters = ParameterFields(OFFERED, annotator)
        self.control_error = gr.HTML("", padding=False)
        self.shown_control = _shown_picture("control picture", "shown-control", 300)

    def _lay_out_drawing(self) -> None:
        self.prompt = gr.Textbox(PROMPT, label="prompt", lines=2, elem_id="prompt")
        self.negative = gr.Textbox("", label="negative prompt")
        with gr.Row():
            self.draw = gr.Button("Draw", variant="primary", elem_id="draw")
            self.cancel = gr.Button("Cancel", variant="stop", elem_id="cancel")
        self.message = gr.HTML(message("The first picture is one click away."), elem_id="message")
        with gr.Row():
            self.picture = _shown_picture("picture", "picture", 460)
            self.second_picture = _shown_picture(
                "picture with the second settings", "second-picture", 460, visible=False
            )
        with gr.Row():
            with gr.Column(min_width=280):
                self.first = SettingFields(self._settings, "first")
            with gr.Column(min_width=280, visible=False) as self.second_column:
                self.second = SettingFields(self._settings, "second", scale=0.5)
        with gr.Row():
            self.random = gr.Button("Another seed", elem_id="random")
            self.compare = gr.Checkbox(False, label="compare two settings", elem_id="compare")

    # what happens

    def _connect(self) -> None:
        self.draw_tab.select(lambda: "draw", None, self.source, queue=False, **_PRIVATE)
        self.upload_tab.select(lambda: "upload", None, self.source, queue=False, **_PRIVATE)
        self.bundle.change(self.on_bundle, self.bundle, [self.control, self.size], **_PRIVATE)
        self.control.change(self.on_control, [self.bundle, self.control], self.annotator, **_PRIVATE)
        self.annotator.change(self.parameters.show, self.annotator, self.parameters.groups, **_PRIVATE)
        self.compare.change(
            lambda on: [gr.update(visible=on)] * 2,
            self.compare,
            [self.second_column, self.second_picture],
            **_PRIVATE,
        )
        self.random.click(lambda: secrets.randbits(32), None, self.first.seed, **_PRIVATE)
        of_control = {
            self.editor,
            self.upload,
            self.source,
            self.fill_drawn,
            self.fill_uploaded,
            self.annotator,
            self.resize,
            self.size,
            *self.parameters.fields,
        }
        for field in of_control:
            field.change(
                self.on_control_picture,
                {self.bundle, *of_control},
                [self.shown_control, self.control_error],
                trigger_mode="always_last",
                **_PRIVATE,
            )
        of_drawing = {self.bundle, self.control, self.prompt, self.negative, self.compare, self.history}
        of_drawing |= {*of_control, *self.first.all, *self.second.all}
        shown = [self.message, self.shown_control, self.picture, self.second_picture]
        self.draw.click(
            self.on_draw, of_drawing, [*shown, self.gallery, self.history, self.python, self.curl], **_PRIVATE
        )
        self.cancel.click(self.on_cancel, None, None, queue=False, **_PRIVATE)
        self.gallery.select(
            self.on_select, self.history, [self.shown_control, self.picture, self.python, self.curl], **_PRIVATE
        )
        self.blocks.unload(self.on_cancel)

    def on_bundle(self, bundle: str) -> tuple[Any, Any]:
        """Another bundle: its controls and sizes."""
        manifest = self.service.bundles[bundle]
        names = [control.name for control in manifest.controls]
        fitting = sizes(manifest.profile)
        chosen = _first_control(names)
        return gr.update(choices=[*names, NO_CONTROL], value=chosen), gr.update(choices=fitting, value=fitting[0])

    def on_control(self, bundle: str, name: str) -> Any:
        """Another control: its annotator."""
        controls = [control for control in self.service.bundles[bundle].controls if control.name == name]
        return annotator_for(controls[0]) if controls else gr.skip()

    async def on_control_picture(self, given: Mapping[Any, Any]) -> dict[Any, Any]:
        """Another drawing, upload or annotator: shows what control picture it gives."""
        try:
            return {self.shown_control: await self._control_of(given), self.control_error: ""}
        except ControlRTError as error:
            return {self.shown_control: None, self.control_error: error_line(error)}

    async def _control_of(self, given: Mapping[Any, Any]) -> Image.Image:
        uploads = given[self.source] == "upload"
        editor = given[self.editor]
        annotator: str = given[self.annotator]
        width, height = parse_size(given[self.size])
        profile = self.service.bundles[given[self.bundle]].profile
        profile.check(width, height, profile.batch.low)
        return await asyncio.to_thread(
            control_picture,
            given[self.upload] if uploads else editor and editor["composite"],
            fill=given[self.fill_uploaded if uploads else self.fill_drawn],
            annotator=annotator,
            values=self.parameters.values(annotator, given),
            width=width,
            height=height,
            resize=given[self.resize],
        )

    def _choices_of(self, given: Mapping[Any, Any]) -> list[Choices]:
        """One, or two to compare."""
        width, height = parse_size(given[self.size])
        control = given[self.control]
        common = {
            "bundle": given[self.bundle],
            "prompt": given[self.prompt],
            "negative_prompt": given[self.negative],
            "control": None if control == NO_CONTROL else control,
            "width": width,
            "height": height,
            "vae_tiling": self.service.bundles[given[self.bundle]].profile.vae_tile is not None,
        }
        columns = [self.first, self.second] if given[self.compare] else [self.first]
        return [Choices(**common, **column.values(given)) for column in columns]

    async def on_draw(self, given: Mapping[Any, Any], request: gr.Request) -> AsyncIterator[dict[Any, Any]]:
        """Draws, and shows how far it is; whatever goes wrong is one line on the page."""
        session, jobs = str(request.session_hash), list[Job]()
        try:
            chosen = self._choices_of(given)
            yield {self.message: message("Making the control picture."), self.second_picture: None}
            control = await self._control_of(given) if chosen[0].control is not None else None
            yield {self.shown_control: control}
            calls = [(each.bundle, each.arguments(control)) for each in chosen]
            jobs += await submit_all(self.service, self._settings, calls)
            self._running[session] += jobs
            async for _ in watch_all(jobs):
                yield self._progress(jobs, chosen)
            yield self._results(jobs, chosen, control, given[self.history], request)
        except ControlRTError as error:
            yield {self.message: error_line(error)}
        except Exception as error:
            log("unexpected error", logging.ERROR, error=error)
            yield {self.message: error_line(ControlRTError(_UNEXPECTED))}
        finally:
            for job in jobs:
                job.cancel()  # nothing, once it is finished
            self._running[session] = [job for job in self._running[session] if job not in jobs]
            if not self._running[session]:
                del self._running[session]

    def _progress(self, jobs: Sequence[Job], chosen: Sequence[Choices]) -> dict[Any, Any]:
        shown: dict[Any, Any] = {self.message: progress_line(jobs)}
        for job, choices, picture in zip(jobs, chosen, (self.picture, self.second_picture), strict=False):
            preview = preview_of(job, choices.width, choices.height)
            if preview is not None:
                shown[picture] = preview
        return shown

    def _results(
        self,
        jobs: Sequence[Job],
        chosen: Sequence[Choices],
        control: Image.Image | None,
        history: Sequence[Drawn],
        request: gr.Request,
    ) -> dict[Any, Any]:
        shown: dict[Any, Any] = {self.message: result_line(jobs)}
        new: list[Drawn] = []
        for job, choices, picture in zip(jobs, chosen, (self.picture, self.second_picture), strict=False):
            if job.result is None:
                continue
            made = Image.fromarray(job.result.pictures[0])
            caption = _caption(choices, chosen)
            shown[picture] = gr.update(value=made, label=caption)
            new.append(Drawn(choices=choices, control=control, picture=made, caption=caption))
        if new:
            kept = [*new, *history][:KEPT]
            shown[self.history] = kept
            shown[self.gallery] = [(each.picture, each.caption) for each in kept]
            shown |= self._code(new[0], request)
        return shown

    def _code(self, drawn: Drawn, request: gr.Request) -> dict[Any, Any]:
        server = f"{request.url.scheme}://{request.url.netloc}"
        curl = curl_code(drawn.choices, server, asks_for_key=bool(self._settings.api_keys))
        return {self.python: python_code(drawn.choices), self.curl: curl}

    def on_select(self, history: Sequence[Drawn], event: gr.SelectData, request: gr.Request) -> dict[Any, Any]:
        """A picture of the gallery: shows it, its control picture and its code."""
        if not 0 <= event.index < len(history):
            return {self.picture: gr.skip()}
        drawn = history[event.index]
        shown = {
            self.picture: gr.update(value=drawn.picture, label=drawn.caption),
            self.shown_control: drawn.control,
        }
        return shown | self._code(drawn, request)

    def on_cancel(self, request: gr.Request) -> None:
        """Cancels what the page waits for; also when it is closed."""
        for job in self._running.get(str(request.session_hash), []):
            job.cancel()


def _shown_picture(label: str, name: str, height: int, *, visible: bool = True) -> Any:
    return gr.Image(
        label=label,
        type="pil",
        format="png",
        interactive=False,
        buttons=["download", "fullscreen"],
        height=height,
        visible=visible,
        elem_id=name,
    )


def _first_control(names: Sequence[str]) -> str:
    """Where a page begins: a control that takes a filled drawing as it is, if there is one."""
    shapes = [name for name in names if any(word in name for word in ("mask", "seg", "scribble"))]
    return (shapes or [*names, NO_CONTROL])[0]


def _caption(choices: Choices, chosen: Sequence[Choices]) -> str:
    """What tells a picture from the others that are drawn with it."""
    told = [f"seed {choices.seed}"]
    if len(chosen) > 1:
        told = [f"{name} {getattr(choices, name)}" for name in differences(*chosen)] or told
    return ", ".join(told)
