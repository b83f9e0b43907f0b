/* The query: its picture and map, and the cells on it that can be chosen. */

import { find, make } from "./dom.js";
import { mapOf, strongest } from "./maps.js";
import { Shot } from "./shot.js";
import { fixed, placeOf } from "./words.js";

const STEPS = {
  ArrowUp: [-1, 0],
  ArrowDown: [1, 0],
  ArrowLeft: [0, -1],
  ArrowRight: [0, 1],
  Home: [0, -Infinity],
  End: [0, Infinity],
  PageUp: [-Infinity, 0],
  PageDown: [Infinity, 0],
};

export class QueryView {
  /** @param chosen called with a row and a column */
  constructor(chosen) {
    this.chosen = chosen;
    this.shot = new Shot(256);
    find("query-shot").append(this.shot.element);
    this.grid = null;
    this.address = null;
  }

  /** A picture that was just given; its size is told by the browser until the service tells it. */
  begin(blob) {
    if (this.address !== null) URL.revokeObjectURL(this.address);
    this.address = URL.createObjectURL(blob);
    this.setCells(null);
    this.shot.setMap(null, 0);
    this.shot.setRing(null, null);
    this.shot.image.addEventListener("load", () => {
      const { naturalWidth, naturalHeight } = this.shot.image;
      if (this.grid === null && naturalWidth > 0) {
        this.shot.setSize({ width: naturalWidth, height: naturalHeight }, null);
      }
    }, { once: true });
    this.shot.setPicture(this.address, "your picture");
  }

  /** What the service says of it. */
  answered(answer) {
    this.shot.setSize(answer.picture, answer.extent);
    this.map = mapOf(answer.cam);
  }

  /** Lays a grid of cells over the picture, or takes it away. */
  setCells(shape) {
    const same = shape !== null && this.grid?.rows === shape.rows && this.grid.columns === shape.columns;
    if (same) return;
    this.grid?.element.remove();
    this.grid = shape === null ? null : this.makeGrid(shape.rows, shape.columns);
    if (this.grid !== null) this.shot.inside.append(this.grid.element);
  }

  makeGrid(rows, columns) {
    const element = make("div", {
      class: "cells",
      role: "grid",
      "aria-label": "Points of your picture. Choose one to see what each result matched there.",
    });
    const cells = [];
    for (let row = 0; row < rows; row += 1) {
      const line = make("div", { role: "row" });
      for (let column = 0; column < columns; column += 1) {
        const cell = make("div", {
          role: "gridcell",
          tabindex: "-1",
          "aria-label": placeOf(row, column),
          "aria-selected": "false",
        });
        cells.push(cell);
        line.append(cell);
      }
      element.append(line);
    }
    const grid = { element, cells, rows, columns, here: 0 };
    const middle = Math.floor(rows / 2) * columns + Math.floor(columns / 2);
    grid.here = middle;
    cells[middle].tabIndex = 0;
    this.listen(grid);
    return grid;
  }

  listen(grid) {
    const { element, cells, columns } = grid;
    const choose = (target) => {
      const place = cells.indexOf(target);
      if (place < 0) return;
      this.walk(place, false);
      this.chosen(Math.floor(place / columns), place % columns);
    };
    // A mouse need not wait for its button to come up, and may be dragged on.
    element.addEventListener("pointerdown", (event) => {
      if (event.pointerType === "mouse" && event.button === 0) choose(event.target);
    });
    element.addEventListener("pointerover", (event) => {
      if (event.pointerType === "mouse" && event.buttons === 1) choose(event.target);
    });
    element.addEventListener("click", (event) => choose(event.target));
    element.addEventListener("keydown", (event) => {
      if (event.key === "Enter" || event.key === " ") {
        event.preventDefault();
        choose(event.target);
      } else if (event.key in STEPS) {
        event.preventDefault();
        this.step(...STEPS[event.key]);
      }
    });
  }

  step(down, across) {
    const { rows, columns, here } = this.grid;
    const within = (value, most) => Math.min(Math.max(value, 0), most - 1);
    const row = within(Math.floor(here / columns) + down, rows);
    const column = within((here % columns) + across, columns);
    this.walk(row * columns + column, true);
  }

  /** The one cell that the tab key comes to. */
  walk(place, focus) {
    const { cells } = this.grid;
    cells[this.grid.here].tabIndex = -1;
    this.grid.here = place;
    cells[place].tabIndex = 0;
    if (focus) cells[place].focus({ preventScroll: true });
  }

  /** The answer's own map. */
  showOwn() {
    this.showPlain(this.map);
  }

  /** Evidence for alone, on its own scale. */
  showPlain(map) {
    this.shot.setMap(map, strongest([map]));
    this.mark(null);
  }

  /** Evidence for (red) and against (blue), on its own scale. */
  showSigned(map) {
    this.shot.setMap(map, strongest([map], true), true);
    this.mark(null);
  }

  /** The picture alone. */
  showNothing() {
    this.shot.setMap(null, 0);
    this.mark(null);
  }

  /** The picture alone, with the chosen point. */
  showPoint(row, column) {
    this.shot.setMap(null, 0);
    this.mark({ row, column });
  }

  mark(cell) {
    this.shot.setRing(cell, this.grid);
    if (this.grid === null) return;
    const { cells, columns } = this.grid;
    const chosen = cell === null ? -1 : cell.row * columns + cell.column;
    this.grid.marked ??= -1;
    if (this.grid.marked >= 0) cells[this.grid.marked].setAttribute("aria-selected", "false");
    if (chosen >= 0) cells[chosen].setAttribute("aria-selected", "true");
    this.grid.marked = chosen;
  }
}

/** Whether the first result is right: what is doubtful stands above the map. */
export function showMatch({ match, neighbors }) {
  find("match").hidden = match === null;
  if (match === null) return;
  const doubtful = match < (neighbors[0]?.label ? 0.5 : 0.2);
  find("match").dataset.kind = doubtful ? "bad" : "good";
  find("match").textContent = `${doubtful ? "Doubtful result. Match" : "Match"} ${fixed(match, 2)}`;
}

/** Trust, in words and as a meter. */
export function showTrust({ trust, trusted, direct }) {
  find("trust").hidden = trust === null;
  if (trust === null) return;
  const words = direct
    ? "Not transferred: this map was computed on your picture itself."
    : trusted
      ? "Much like the map that computing it on your picture would draw. It does not say that the results are right."
      : "Not to be trusted: the map may show the wrong places.";
  find("trust").dataset.kind = direct ? "direct" : trusted ? "good" : "bad";
  find("trust-number").textContent = fixed(trust, 2);
  find("trust-words").textContent = words;
  find("trust-fill").style.width = `${100 * trust}%`;
  const meter = find("trust-meter");
  meter.setAttribute("aria-valuenow", trust.toFixed(2));
  meter.setAttribute("aria-valuetext", `${fixed(trust, 2)}. ${words}`);
}
