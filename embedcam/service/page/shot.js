/* A picture with its map, and marks on it. */

import { draw, make } from "./dom.js";
import { drawMap } from "./maps.js";

export class Shot {
  /** @param side of the map's canvas in pixels */
  constructor(side = 160) {
    this.side = side;
    this.image = make("img", { alt: "", draggable: "false", hidden: true });
    this.canvas = make("canvas", { class: "map", "aria-hidden": "true" });
    this.seen = make("div", { class: "seen", hidden: true });
    this.marks = draw("svg", { class: "marks", "aria-hidden": "true" });
    this.inside = make("div", { class: "inside" }, this.canvas, this.seen);
    this.element = make("div", { class: "shot" }, this.image, this.inside, this.marks);
    this.note = make("span", { class: "absent", hidden: true });
    this.strip = make("span", { class: "strip", hidden: true });
    this.element.append(this.note, this.strip);
    this.image.addEventListener("load", () => {
      this.image.hidden = false;
      this.note.hidden = true;
    });
    this.image.addEventListener("error", () => {
      this.setAbsent("Your browser cannot show this picture.");
    });
    this.setSize({ width: 1, height: 1 }, null);
  }

  /** The picture itself, by a blob's address. */
  setPicture(address, alt) {
    this.image.alt = alt;
    this.image.src = address;
  }

  /** A sentence in place of the picture. */
  setAbsent(text) {
    this.image.hidden = true;
    this.note.textContent = text;
    this.note.hidden = false;
  }

  /** A sentence on the picture: it is another than the map was made of. */
  setStrip(text) {
    this.strip.textContent = text;
    this.strip.hidden = false;
  }

  /** The picture's size, and what of it the map covers: [x0, y0, x1, y1] in its pixels, or null. */
  setSize(size, extent) {
    this.size = size;
    this.extent = extent ?? [0, 0, size.width, size.height];
    const [x0, y0, x1, y1] = this.extent;
    const { width, height } = size;
    this.element.style.setProperty("--ratio", String(width / height));
    const share = (value, whole) => `${(100 * value) / whole}%`;
    Object.assign(this.inside.style, {
      left: share(x0, width),
      top: share(y0, height),
      width: share(x1 - x0, width),
      height: share(y1 - y0, height),
    });
    // Half a pixel is rounding, not a crop.
    this.seen.hidden = !(x0 > 0.5 || y0 > 0.5 || x1 < width - 0.5 || y1 < height - 0.5);
  }

  /** A map, or null for the picture alone; see `drawMap`. */
  setMap(map, top, both = false) {
    const [before, scale, signed] = this.drawn ?? [];
    if (this.drawn && before === map && scale === top && signed === both) return;
    this.drawn = [map, top, both];
    drawMap(this.canvas, map, top, both, this.side);
  }

  /** Where the middle of a cell lies, as shares of the picture's width and height. */
  middle(row, column, map) {
    const [x0, y0, x1, y1] = this.extent;
    const x = (x0 + ((column + 0.5) / map.columns) * (x1 - x0)) / this.size.width;
    const y = (y0 + ((row + 0.5) / map.rows) * (y1 - y0)) / this.size.height;
    return { x: Math.min(Math.max(x, 0), 1), y: Math.min(Math.max(y, 0), 1) };
  }

  /** A ring around one cell's middle, or none. */
  setRing(cell, map) {
    this.marks.replaceChildren();
    if (cell === null) return;
    const at = this.middle(cell.row, cell.column, map);
    for (const kind of ["ring under", "ring"]) {
      const place = { cx: `${100 * at.x}%`, cy: `${100 * at.y}%`, r: "9", class: kind };
      this.marks.append(draw("circle", place));
    }
  }
}
