"""Puts the page into a server's application."""

from __future__ import annotations

import hmac
from typing import Any

import gradio as gr
from fastapi import FastAPI
from fastapi.responses import RedirectResponse

from controlrt.runtime.server.jobs import Service
from controlrt.runtime.server.settings import Settings
from controlrt.runtime.server.ui.page import Page

PATH = "/ui"
_CSS = """
.message { padding: 0.3em 0; }
.message.wrong { color: var(--error-text-color); font-weight: 600; }
.message .bar { height: 6px; margin-top: 6px; border-radius: 3px; background: var(--border-color-primary); }
.message .bar div { height: 100%; border-radius: 3px; background: var(--color-accent); transition: width 0.1s; }
#message { min-height: 3.4em; }
"""


def mount_page(app: FastAPI, service: Service, settings: Settings) -> None:
    """Serves the page at ``/ui``, where ``/`` leads.

    It asks for nothing from other hosts. Where the server has API keys, the page asks for one as a password.

    Args:
        app: as ``build_app`` makes it.
        service: what draws, in the event loop that serves ``app``.
        settings: the server's limits.
    """
    keys = settings.api_keys

    def knows_key(user: str, password: str) -> bool:
        del user
        given = password.encode("utf-8")
        return any([hmac.compare_digest(given, key.encode("utf-8")) for key in keys])  # noqa: C419 - as shows_key

    login: dict[str, Any] = {}
    if keys:
        login = {
            "auth": knows_key,
            "auth_message": "Any user name will do. The password is one of the server's API keys.",
        }

    @app.get("/", include_in_schema=False)
    async def lead_to_page() -> RedirectResponse:
        return RedirectResponse(f"{PATH}/")

    gr.mount_gradio_app(
        app,
        Page(service, settings).blocks,
        PATH,
        footer_links=[],
        run_history=False,
        ssr_mode=False,
        mcp_server=False,
        show_error=True,
        max_file_size=settings.max_body_bytes,
        css=_CSS,
        **login,
    )
    page: Any = app.routes[-1]
    app.state.before_exit.append(page.app.stop_event.set)  # or open pages would keep their connections
