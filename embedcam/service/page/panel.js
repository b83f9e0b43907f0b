/* The panel beside the results: how to read them, the receipt of one, or of one above another. */

import { draw, find, make } from "./dom.js";
import { mapOf, strongest } from "./maps.js";
import { carried, exemplarsOf, outlineAll, placeList } from "./places.js";
import { Shot } from "./shot.js";
import { fixed, nameOf, placeOf, sentence, signed } from "./words.js";

const LINES = 6;
const CONCEPTS = 8;
const SMALL = 5e-4; // Would be shown as 0.000.
const FEATURES = "A channel is one of the network’s own features, a concept several that go together; beside them is where in the index they answer most.";

let observer = null;

function show(title, close, ...parts) {
  observer?.disconnect();
  const cross = close && make(
    "button",
    { type: "button", class: "round close", "aria-label": "Close", title: "Close", click: close },
    draw("svg", { viewBox: "0 0 20 20", "aria-hidden": "true" }, draw("path", { d: "M5 5l10 10M15 5L5 15" })),
  );
  const heading = make("div", { class: "heading" }, make("h2", { id: "panel-title", tabindex: "-1", text: title }), cross);
  find("panel").replaceChildren(heading, ...parts.filter((part) => part !== null));
}

/** What may be done, where nothing is chosen. */
export function showGuide(ready) {
  const tip = (head, text, ...shapes) =>
    make("li", {}, draw("svg", { viewBox: "0 0 40 40", "aria-hidden": "true" }, ...shapes),
      make("p", {}, make("b", { text: head }), make("span", { text })));
  const circle = (cx, cy, r, kind) => draw("circle", { cx, cy, r, class: kind });
  const line = (d, kind = "") => draw("path", { d, class: kind });
  show(
    "Ask why",
    null,
    make("ul", { class: "tips" },
      tip("Point at a result", "See what its similarity is made of, and which places match.",
        line("M6 30V14M15 30V8M24 30V20", "bars"), line("M33 30V26", "bars cool")),
      tip("Click a place in your picture", "Every result shows what it has that matches it.",
        circle(20, 20, 5, "dot"), circle(20, 20, 12, "halo")),
      tip("Press Compare on two results", "See why one is above the other.",
        line("M6 20h11", "bars cool"), line("M34 20H23", "bars"), line("M20 8v24", "rule"))),
    ready ? null : make("p", { class: "quiet busy", text: "Adding up what each result matches …" }),
  );
}

/** One result was picked to be compared, and another is awaited. */
export function showPicked(card, close) {
  show(
    `Compare result ${card.rank}`,
    close,
    make("p", { class: "lead", text: "Now press Compare on another result." }),
    make("p", { class: "quiet", text: "You then see what puts one of them above the other." }),
  );
}

/** While something is on its way, or where it cannot be had. */
export function showState(title, text, busy, close, retry = null) {
  const again = retry && make("button", { type: "button", class: "plain", text: "Try again", click: retry });
  show(title, close, make("p", { class: busy ? "quiet busy" : "lead", text: sentence(text) }), again);
}

/** Why a result matches: all of the query, or what of it lies in a box. */
export function showReceipt(card, query, { search, close, receipt = card.receipt, boxed = false }) {
  const title = boxed ? `What result ${card.rank} has of the box` : `Why result ${card.rank} matches`;
  if (receipt === null) {
    if (card.trouble === null) showState(title, "Adding up what it matches …", true, close);
    else showState(title, card.trouble, false, close);
    return;
  }
  const amounts = [
    { words: "shared with the average image", value: receipt.shared, apart: true },
    ...(boxed ? [{ words: "outside the box", value: receipt.outside, apart: true }] : []),
    ...chosen(receipt),
    ...parts(receipt),
    ...remainder(receipt),
  ];
  const placed = receipt.places.length > 0;
  const pair = make("div", { class: "pair" });
  const shots = [
    pictured(query.shot, query.address, receipt.queryMap, "what in your picture matches"),
    pictured(card.shot, card.address, receipt.resultMap, `what in result ${card.rank} matches`),
  ];
  pair.append(framed(shots[0], "Your picture"), framed(shots[1], `${card.rank} · ${nameOf(card.result)}`));
  show(
    title,
    close,
    placed ? placeList(receipt, query, card) : null,
    placed ? make("p", { class: "quiet", text: carried(receipt, boxed) }) : null,
    pair,
    make("p", { class: "quiet", text: `Red speaks for the match, blue against it.${placed ? " Outlines are the places above." : " Lines join the places that match best."}` }),
    sum(amounts, { words: "similarity", value: receipt.similarity }, "What adds up to the similarity"),
    placed ? null : spoken(receipt),
    make("p", { class: "quiet", text: exactness(receipt) }),
    make("p", { class: "buttons" },
      make("button", { type: "button", class: "plain", text: "Search with this result", click: search })),
  );
  if (!placed) link(pair, shots, receipt);
  else {
    outlineAll(shots[0], receipt.places.map((one) => one.query), receipt.queryMap);
    outlineAll(shots[1], receipt.places.map((one) => one.result), receipt.resultMap);
  }
}

/**
 * Why one result is above another.
 * @param stored whether the query shows the map of the stored weights; `change` shows the other one
 */
export function showContrast(above, below, query, answer, { close, change, stored }) {
  const { contrast } = answer;
  const amounts = [...chosen(contrast), ...parts(contrast), ...remainder(contrast)];
  const three = make("div", { class: "pair three" });
  const map = mapOf(contrast.query);
  three.append(
    framed(pictured(query.shot, query.address, map, "what in your picture decides"), "Your picture"),
    framed(pictured(above.shot, above.address, above.receipt?.resultMap ?? null, `result ${above.rank}`), `${above.rank} · ${nameOf(above.result)}`, "for"),
    framed(pictured(below.shot, below.address, below.receipt?.rivalMap ?? null, `result ${below.rank}`), `${below.rank} · ${nameOf(below.result)}`, "against"),
  );
  show(
    `Why ${above.rank} is above ${below.rank}`,
    close,
    three,
    make("p", { class: "quiet" },
      "In all three ",
      make("b", { class: "for", text: `red speaks for result ${above.rank}` }),
      ", ",
      make("b", { class: "against", text: `blue for result ${below.rank}` }),
      ": their own maps show what in them matches your picture."),
    sum(amounts, { words: `result ${above.rank} is more similar by`, value: contrast.score }, "What adds up to the difference"),
    make("p", { class: "quiet", text: exactness(contrast) }),
    make("p", { class: "buttons" },
      make("button", { type: "button", class: "plain", id: "stored", click: change,
        text: stored ? "Show the map that adds up" : "Show the stored weights’ map" })),
  );
  return map;
}

/** A few concepts or channels, by magnitude, largest contribution first; and all the rest. */
function chosen({ channels, other_channels: others, concepts = [], other_concepts: left, no_concept: none }) {
  const named = concepts.length > 0;
  const lines = named ? concepts : channels;
  const kept = [...lines]
    .sort((one, other) => Math.abs(other.contribution) - Math.abs(one.contribution))
    .slice(0, named ? CONCEPTS : LINES);
  const rest = lines.filter((line) => !kept.includes(line));
  const value = rest.reduce((total, line) => total + line.contribution, named ? left : others);
  const shown = lines.filter((line) => kept.includes(line)).map((line) => ({
    words: named ? line.name || `concept ${line.concept}` : `channel ${line.channel}`,
    value: line.contribution,
    exemplars: exemplarsOf(line),
  }));
  shown.push({ words: named ? "other concepts" : "other channels", value, rest: true });
  if (named && Math.abs(none) >= SMALL) shown.push({ words: "what no concept explains", value: none, rest: true });
  return shown;
}

/** What is neither of a cell nor of a channel, such as "the MLP". */
function parts({ parts: named }) {
  return Object.entries(named).map(([words, value]) => ({ words, value, rest: true }));
}

function remainder({ exact, remainder: value }) {
  if (exact && Math.abs(value) < SMALL) return [];
  return [{ words: exact ? "the head’s bias" : "not of first order", value }];
}

function exactness({ exact, held = [] }) {
  return exact
    ? `The amounts are exact${held.length ? `, with ${held.join(", ")} held` : ""}. ${FEATURES}`
    : `The amounts are of first order. ${FEATURES}`;
}

/** A table of amounts with bars: to the right for, to the left against. */
function sum(amounts, total, caption) {
  const barred = amounts.filter((one) => !one.apart).map((one) => one.value);
  const top = Math.max(...barred.map(Math.abs), 1e-12);
  const zero = Math.min(...barred) < -SMALL ? 50 : 0;
  const rows = amounts.map(({ words, value, apart, rest, exemplars = null }) => {
    const bar = make("span", { class: `amount ${value < 0 ? "against" : "for"}${rest ? " rest" : ""}` });
    const length = apart ? 0 : ((100 - zero) * Math.abs(value)) / top;
    bar.style.width = `${length}%`;
    bar.style.left = `${value < 0 ? zero - length : zero}%`;
    return make("tr", { class: apart ? "apart" : null },
      make("th", { scope: "row", colspan: apart ? "2" : null }, make("span", { text: words }), exemplars),
      apart ? null : make("td", { class: "bars", "aria-hidden": "true" }, bar),
      make("td", { class: "value", text: signed(value) }));
  });
  return make("table", { class: zero === 0 ? "sum onesided" : "sum" },
    make("caption", { class: "unseen", text: caption }),
    make("tbody", {}, ...rows),
    make("tfoot", {}, make("tr", {},
      make("th", { scope: "row", colspan: "2", text: total.words }),
      make("td", { class: "value", text: fixed(total.value) }))));
}

/** Another shot of the same picture. */
function pictured(shot, address, map, alt) {
  const own = new Shot(144);
  own.setSize(shot.size, shot.extent);
  if (address === null) own.setAbsent("no picture");
  else own.setPicture(address, alt);
  own.setMap(map, map === null ? 0 : strongest([map], true), true);
  return own;
}

function framed(shot, caption, kind = "") {
  return make("figure", { class: kind }, make("div", { class: "frame" }, shot.element),
    make("figcaption", {}, make("bdi", { text: caption })));
}

/** Lines between the cells that match best, laid over both pictures. */
function link(pair, shots, receipt) {
  const layer = draw("svg", { class: "links", "aria-hidden": "true" });
  pair.append(layer);
  const place = () => {
    const whole = pair.getBoundingClientRect();
    const at = (shot, cell, map) => {
      const box = shot.element.getBoundingClientRect();
      const { x, y } = shot.middle(cell[0], cell[1], map);
      return { x: box.left - whole.left + x * box.width, y: box.top - whole.top + y * box.height };
    };
    const lines = receipt.links.map((one, number) => {
      const start = at(shots[0], one.query, receipt.queryMap);
      const end = at(shots[1], one.result, receipt.resultMap);
      const bend = (end.x - start.x) / 2;
      const way = `M${start.x} ${start.y}C${start.x + bend} ${start.y} ${end.x - bend} ${end.y} ${end.x} ${end.y}`;
      const dot = ({ x, y }) => draw("circle", { cx: x, cy: y, r: 4.5 });
      return draw("g", { class: `link link-${number % 5}` },
        draw("path", { d: way, class: "under" }), draw("path", { d: way }), dot(start), dot(end));
    });
    layer.replaceChildren(...lines.reverse());
  };
  observer = new ResizeObserver(place);
  observer.observe(pair);
}

/** The links, for those who do not see them. */
function spoken(receipt) {
  const items = receipt.links.map((one) =>
    make("li", { text: `${placeOf(...one.query)} of your picture matches ${placeOf(...one.result)} of the result: ${signed(one.contribution)}` }));
  return items.length === 0 ? null : make("ul", { class: "unseen", "aria-label": "Places that match best" }, ...items);
}
