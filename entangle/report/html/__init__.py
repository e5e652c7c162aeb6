"""The HTML report: `write_page` and `render_page`."""

from entangle.report.html.page import render_page, write_page

__all__ = ["render_page", "write_page"]
