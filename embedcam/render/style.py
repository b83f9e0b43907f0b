"""How pages look: light and dark, on screens of any width, and on paper."""

from typing import Final

STYLE: Final = """
:root { --paper: #fff; --ink: #181c24; --quiet: #5c6474; --line: #dee2e8; --mat: #f3f5f8;
  --accent: #b3420f; }
@media (prefers-color-scheme: dark) {
  :root { --paper: #14161b; --ink: #e9ebf0; --quiet: #9aa2b1; --line: #2d323c; --mat: #1e2229;
    --accent: #ffa45c; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; }
main { max-width: 82rem; margin: 0 auto; padding: 3rem clamp(1rem, 4vw, 3rem) 4rem; }
h1 { font-size: clamp(1.6rem, 4vw, 2.3rem); line-height: 1.2; letter-spacing: -.015em;
  margin: 0 0 1rem; text-wrap: balance; }
h2 { font-size: 1.15rem; margin: 0 0 .4rem; overflow-wrap: anywhere; }
.intro, .notes { max-width: 44rem; margin: 0 0 1rem; }
.quiet { color: var(--quiet); font-size: .875rem; margin: .6rem 0 0; }
.legend { display: flex; align-items: center; gap: .75rem; color: var(--quiet);
  font-size: .875rem; margin: 1.75rem 0 0; }
.bar { width: min(15rem, 40vw); height: .75rem; border-radius: .375rem;
  background-color: #e2e5ea; }
section { border-top: 1px solid var(--line); margin-top: 2rem; padding-top: 1.5rem; }
.tiles { display: grid; gap: 1.25rem 1rem;
  grid-template-columns: repeat(auto-fill, minmax(min(11.5rem, 44%), 1fr)); }
figure { margin: 0; min-width: 0; }
.wide { grid-column: span 2; }
.compact { display: grid; gap: 0 2.5rem;
  grid-template-columns: repeat(auto-fill, minmax(min(30rem, 100%), 1fr)); }
.compact .tiles { gap: .75rem; grid-template-columns: repeat(4, 1fr); }
.compact h2 { font-size: 1rem; }
@media (max-width: 34rem) { .compact .tiles { grid-template-columns: repeat(2, 1fr); } }
.frame { position: relative; display: grid; aspect-ratio: var(--shape); overflow: hidden;
  border-radius: .5rem; background: var(--mat); place-items: center; color: var(--quiet);
  font-size: .875rem; }
.query .frame { box-shadow: 0 0 0 2px var(--paper), 0 0 0 4px var(--accent); }
.badge { position: absolute; left: .5rem; top: .5rem; padding: .1rem .5rem; border-radius: 1rem;
  background: var(--accent); color: var(--paper); font-size: .75rem; font-weight: 600; }
.frame img { position: absolute; inset: 0; width: 100%; height: 100%; object-fit: contain; }
.map { transition: opacity .15s; }
.frame:hover .plain + .map, .frame:focus .plain + .map { opacity: 0; }
.frame:focus-visible { outline: 3px solid var(--accent); outline-offset: 3px; }
@media (prefers-reduced-motion: reduce) { .map { transition: none; } }
figcaption { padding-top: .5rem; font-size: .875rem; line-height: 1.4; }
figcaption b { display: block; font-weight: 600; overflow-wrap: anywhere; }
figcaption .warning { color: var(--accent); }
figcaption span { display: block; color: var(--quiet); overflow-wrap: anywhere;
  font-variant-numeric: tabular-nums; }
.scroll { overflow-x: auto; margin: 1.75rem 0 .5rem; }
table { border-collapse: collapse; font-size: .9375rem; }
table { min-width: min(100%, 30rem); }
caption { text-align: left; font-weight: 600; padding-bottom: .6rem; text-wrap: balance; }
th, td { text-align: left; padding: .45rem 1.5rem .45rem 0; border-bottom: 1px solid var(--line);
  vertical-align: baseline; }
th { color: var(--quiet); font-weight: 500; font-size: .8125rem; }
.notice { max-width: 52rem; margin: 1.25rem 0; padding: .7rem 1rem; border-radius: .4rem;
  background: var(--mat); border-left: 4px solid var(--accent); font-size: .9375rem; }
.notice.good { border-left-color: #2e8b57; }
.notice ul { margin: .35rem 0 0; padding-left: 1.1rem; }
td:first-child { min-width: 8rem; }
.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
@media print { main { padding: 0; } section { break-inside: avoid; } }
"""

LONG: Final = """
section { content-visibility: auto; contain-intrinsic-size: auto 18rem;
  padding-inline: .5rem; margin-inline: -.5rem; }
section:target h2 { color: var(--accent); }
details { margin: 1.75rem 0 .5rem; }
summary { cursor: pointer; font-weight: 600; }
summary:focus-visible { outline: 3px solid var(--accent); outline-offset: 3px; }
details .scroll { margin-top: .6rem; }
a { color: inherit; text-decoration-color: var(--accent); text-underline-offset: .15em; }
@media print { section { content-visibility: visible; } }
"""
"""For pages of many rows: what is out of sight is neither laid out nor painted.

Such a row is painted no further than its edge, so there is room for the frame of a query's picture.
"""
