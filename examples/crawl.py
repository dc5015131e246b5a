"""An async task: a page a second, three at a time, for as long as it takes; every page is fetched once.

perdure dev --tasks examples/crawl.py
perdure submit crawl --input '{"site": "example.org", "pages": 300}'
"""

from __future__ import annotations

import asyncio
from typing import Any

from perdure import task
from perdure.context import AsyncContext

AT_ONCE = 3


@task(timeout="2 days", no_progress_timeout="10m")
async def crawl(ctx: AsyncContext, site: str, pages: int) -> dict[str, Any]:
    """Count the words of a site."""
    groups = range(0, pages, AT_ONCE)
    async for first in ctx.track(groups, name="pages"):
        numbers = range(first, min(first + AT_ONCE, pages))
        # Steps that run at the same time need a key each: which of them begins first is not always the same.
        counts = await asyncio.gather(*(ctx.step("fetch", fetch, site, number, key=number) for number in numbers))
        ctx.state["words"] = ctx.state.get("words", 0) + sum(counts)
    return {"site": site, "words": ctx.state.get("words", 0)}


async def fetch(site: str, number: int) -> int:
    """How many words are on a page. Made up here, so that the example needs no network."""
    await asyncio.sleep(1)
    return len(site) + number % 7
