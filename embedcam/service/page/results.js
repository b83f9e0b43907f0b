/* The results: a card each, with its picture, its map and what there is to press. */

import { find, make } from "./dom.js";
import { mapOf, opposite, peak, strongest } from "./maps.js";
import { ownMap, picture } from "./service.js";
import { Shot } from "./shot.js";
import { clean, described, fixed, nameOf, sentence, shortened } from "./words.js";

const PICTURE_SIDE = 512;
const SAME = 0.02;

/** Text whose long words may break behind their joints. */
function breakable(text) {
  return text.split(/(?<=[_/.-])/).flatMap((part, place) => (place === 0 ? [part] : [make("wbr"), part]));
}

/** What is written below a result's picture, `last` under it. */
export function caption(result, numbers, last = null) {
  const id = result.label === null ? null : make("bdi", { class: "id", title: clean(result.id), text: shortened(result.id, 44) });
  const name = make("bdi", { class: "name", title: clean(result.label ?? result.id) }, ...breakable(nameOf(result)));
  const number = make("span", { class: "number", title: "similarity", text: numbers });
  return make("div", { class: "caption" }, make("div", {}, name, number), id, last);
}

/** A receipt as the page draws it. */
export function prepared(receipt) {
  const resultMap = mapOf(receipt.result.cells);
  return {
    ...receipt,
    shape: { rows: resultMap.rows, columns: resultMap.columns },
    queryMap: mapOf(receipt.query.cells),
    resultMap,
    rivalMap: opposite(resultMap), // Where it is the lower one of two: all of it in the other colour.
    points: new Map(),
  };
}

/** One result and everything that is known of it. */
export class Card {
  /**
   * @param result as the service says it
   * @param rank from 1
   * @param heard called with "hover", "leave", "choose" or "pick", the card and the event
   */
  constructor(result, rank, heard) {
    this.result = result;
    this.rank = rank;
    this.address = null;
    this.size = { width: 1, height: 1 };
    this.extent = null;
    // The map is the old picture's, and is not laid over the new one; a receipt is the new one's.
    this.changed = result.file === "changed";
    this.own = result.cam === null || this.changed ? null : mapOf(result.cam);
    // Weights of one length, so that results share a scale.
    if (this.own !== null && result.norm > 0) {
      this.own.values = this.own.values.map((value) => value / result.norm);
    }
    this.placed = false;
    this.receipt = null;
    this.trouble = null;
    this.shot = new Shot();
    this.build(heard);
    if (this.changed) this.shot.setStrip("Changed since the build");
  }

  build(heard) {
    const { result, rank } = this;
    const name = described(result, rank) + (this.changed ? ", changed since the build" : "");
    this.button = make(
      "button",
      { type: "button", class: "frame", "aria-label": `${name}. Show why it matched`, "aria-pressed": "false" },
      this.shot.element,
      make("span", { class: "rank", "aria-hidden": "true", text: String(rank) }),
    );
    this.pick = make("button", {
      type: "button",
      class: "pick",
      "aria-pressed": "false",
      "aria-label": `Compare result ${rank} with another`,
      text: "Compare",
    });
    const last = make("div", {}, make("span", { class: "far", text: `distance ${fixed(result.distance)}` }), this.pick);
    this.element = make("li", { class: "card" }, this.button, caption(result, fixed(result.similarity), last));
    const tell = (what) => (event) => heard(what, this, event);
    // Anywhere on it, its name and its buttons too.
    this.element.addEventListener("pointerenter", tell("hover"));
    this.element.addEventListener("pointerleave", tell("leave"));
    this.element.addEventListener("focusin", tell("hover"));
    this.element.addEventListener("focusout", tell("leave"));
    this.button.addEventListener("click", tell("choose"));
    this.pick.addEventListener("click", tell("pick"));
  }

  /** Fetches the picture, and what of it the map covers. */
  async load(signal, redraw) {
    const alt = described(this.result, this.rank);
    const [shown, placed] = await Promise.allSettled([
      picture(this.result.image_url, PICTURE_SIDE, signal),
      ownMap(this.result.cam_url, signal),
    ]);
    if (signal.aborted) return;
    if (placed.status === "fulfilled" && placed.value.picture !== null) {
      this.setSize(placed.value.picture, placed.value.extent);
    }
    if (shown.status === "fulfilled") {
      // Without a map nobody tells the size.
      this.shot.image.addEventListener("load", () => {
        const { naturalWidth: width, naturalHeight: height } = this.shot.image;
        if (!this.placed) this.shot.setSize({ width, height }, null);
      });
      this.address = URL.createObjectURL(shown.value);
      this.shot.setPicture(this.address, alt);
    } else {
      this.shot.setAbsent(sentence(shown.reason.message));
    }
    redraw();
  }

  /** As the service says, the first time. */
  setSize(size, extent) {
    if (this.placed) return;
    [this.size, this.extent, this.placed] = [size, extent, true];
    this.shot.setSize(size, extent);
  }

  /** What the service says of the pair. */
  setReceipt(receipt) {
    this.setSize(receipt.picture, receipt.extent);
    this.receipt = prepared(receipt);
  }

  /** What a cell of the query matches here; null where it is not known yet. */
  matched(row, column) {
    if (this.receipt === null) return null;
    const { pairs, points, shape, queryMap } = this.receipt;
    const cell = row * queryMap.columns + column;
    if (pairs !== null) return { ...shape, values: pairs[cell] };
    return points.get(cell) ?? null;
  }

  /** Keeps what the service says of one cell. */
  setMatched(row, column, lists) {
    this.receipt?.points.set(row * this.receipt.queryMap.columns + column, mapOf(lists));
  }

  /** A map, or the picture alone until it is known where the map lies. */
  show(map, top, both = false) {
    this.shot.setMap(this.placed ? map : null, top, both);
  }

  /** A ring where the largest value of a map lies. */
  ring(map) {
    const best = map === null ? null : peak(map);
    this.shot.setRing(best !== null && best.value > 0 && this.placed ? best : null, map);
  }

  forget() {
    if (this.address !== null) URL.revokeObjectURL(this.address);
  }
}

/** Loads them all, nearest first, and leaves connections for other questions. */
export async function loadAll(cards, signal, redraw) {
  const left = [...cards];
  const lane = async () => {
    for (let card = left.shift(); card && !signal.aborted; card = left.shift()) {
      await card.load(signal, redraw);
    }
  };
  await Promise.all([lane(), lane()]);
}

/** Places for results that are on their way. */
export function showWaiting(count) {
  const places = Array.from({ length: count }, () =>
    make("li", { class: "card waiting", "aria-hidden": "true" }, make("div", { class: "frame" })),
  );
  find("grid").replaceChildren(...places);
  find("results").setAttribute("aria-busy", "true");
}

/** The cards, nearest first. */
export function showCards(cards) {
  find("grid").replaceChildren(...cards.map((card) => card.element));
  find("results").removeAttribute("aria-busy");
}

/** Their own maps, on one scale: the one of all results, whichever are drawn. */
export function drawOwn(cards, all = cards) {
  const top = strongest(all.map((card) => card.own).filter((map) => map !== null));
  for (const card of cards) {
    card.show(card.own, top);
    card.ring(null);
  }
}

/**
 * What one point of the query matches in each, on one scale; those not known yet stay plain.
 *
 * Where the query itself is in the index it matches itself far better than anything else, and would
 * leave the others dark: it has a scale of its own.
 */
export function drawPoint(cards, row, column) {
  const maps = cards.map((card) => card.matched(row, column));
  const near = SAME * Math.max(...cards.map((card) => card.result.distance));
  const itself = cards.map((card) => card.result.distance <= near);
  const top = strongest(maps.filter((map, place) => map !== null && !itself[place]));
  cards.forEach((card, place) => {
    const map = maps[place];
    card.show(map, itself[place] && map !== null ? strongest([map]) : top);
    card.ring(map);
  });
  return maps;
}

/** What a part of the query matches in each, on one scale; those not known yet stay plain. */
export function drawPart(cards, receipts) {
  const maps = cards.map((card) => receipts.get(card)?.resultMap ?? null);
  const top = strongest(maps.filter((map) => map !== null), true);
  cards.forEach((card, place) => {
    card.show(maps[place], top, true);
    card.ring(null);
  });
}

/**
 * Some of them with their receipt's evidence in two colours, the others with their own maps.
 *
 * Of two that are compared the rival's evidence has the rival's colour.
 */
export function drawSome(cards, chosen, rival = null) {
  drawOwn(cards.filter((card) => !chosen.includes(card)), cards);
  for (const card of chosen) {
    const map = card.receipt === null ? null : card === rival ? card.receipt.rivalMap : card.receipt.resultMap;
    card.show(map, map === null ? 0 : strongest([map], true), true);
    card.ring(null);
  }
}
