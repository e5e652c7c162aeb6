"""TRL's own format: prompt, chosen, rejected as texts or messages; or chosen and rejected with the prompt inside."""

from __future__ import annotations

from entangle.data.formats.base import Format, Row, register


@register
class Trl(Format):
    """`prompt`, `chosen`, `rejected`; without a prompt it is what the other two begin with."""

    name = "trl"
    columns = ("prompt", "chosen", "rejected")
    takes_all = True
    reads = (
        "`prompt`, `chosen`, `rejected`, all texts or all lists of role/content messages; without `prompt` it is what "
        "`chosen` and `rejected` begin with in common"
    )

    def matches(self, sample: Row) -> bool:
        """Whatever no other format has claimed."""
        return True

    def convert(self, row: Row, where: str) -> Row:
        """The row as it is."""
        return row
