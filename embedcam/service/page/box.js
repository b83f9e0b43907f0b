/* A box on the query: drawn with the mouse, or moved and resized with the keys. */

import { announce, find, make } from "./dom.js";

const STEP = 0.05; // Of the picture's sides, by one press of a key.
const LEAST = 0.06;
const WAIT = 250; // Milliseconds after the last key until it is asked about.
const MOVES = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };

const within = (value, low, high) => Math.min(Math.max(value, low), high);
const percent = (value) => `${Math.round(100 * value)}%`;

/** What is asked about, as shares [x0, y0, x1, y1] of the picture; null for all of it. */
export class BoxView {
  /**
   * @param shot of the query
   * @param chosen called with the box, or with null where there is none any more
   */
  constructor(shot, chosen) {
    this.chosen = chosen;
    this.ends = null;
    this.waiting = 0;
    this.box = make("div", {
      class: "box",
      tabindex: "0",
      role: "application",
      "aria-roledescription": "box",
      "aria-describedby": "box-help",
      hidden: true,
    });
    this.layer = make("div", { class: "boxing", hidden: true }, this.box);
    shot.element.append(this.layer);
    this.button = find("box-button");
    this.button.addEventListener("click", () => (this.layer.hidden ? this.begin() : this.clear()));
    this.box.addEventListener("keydown", (event) => this.key(event));
    this.layer.addEventListener("pointerdown", (event) => this.drag(event));
  }

  /** Begins with the middle of the picture, which a keyboard can move. */
  begin() {
    this.open(true);
    this.set([0.25, 0.25, 0.75, 0.75]);
    this.box.focus({ preventScroll: true });
    this.ask();
  }

  open(there) {
    this.layer.hidden = !there;
    this.button.setAttribute("aria-pressed", String(there));
    find("box-help").hidden = !there;
  }

  /** Nothing is asked about any more; says so, unless it is quiet. */
  clear(quiet = false) {
    clearTimeout(this.waiting);
    const focused = this.layer.contains(document.activeElement);
    this.open(false);
    this.set(null);
    if (focused) this.button.focus();
    if (!quiet) this.chosen(null);
  }

  set(ends) {
    this.ends = ends;
    this.box.hidden = ends === null;
    if (ends === null) return;
    const [x0, y0, x1, y1] = ends;
    Object.assign(this.box.style, { left: percent(x0), top: percent(y0), width: percent(x1 - x0), height: percent(y1 - y0) });
    this.box.setAttribute("aria-label", this.words());
  }

  words() {
    const [x0, y0, x1, y1] = this.ends.map(percent);
    return `Box from ${x0} to ${x1} across and ${y0} to ${y1} down`;
  }

  ask() {
    clearTimeout(this.waiting);
    this.chosen(this.ends);
  }

  key(event) {
    if (event.key === "Escape") {
      event.stopPropagation();
      this.clear();
      return;
    }
    if (!(event.key in MOVES)) return;
    event.preventDefault();
    const [across, down] = MOVES[event.key].map((step) => step * STEP);
    let [x0, y0, x1, y1] = this.ends;
    if (event.shiftKey) {
      x1 = within(x1 + across, x0 + LEAST, 1);
      y1 = within(y1 + down, y0 + LEAST, 1);
    } else {
      const [dx, dy] = [within(across, -x0, 1 - x1), within(down, -y0, 1 - y1)];
      [x0, y0, x1, y1] = [x0 + dx, y0 + dy, x1 + dx, y1 + dy];
    }
    this.set([x0, y0, x1, y1]);
    announce(this.words());
    clearTimeout(this.waiting);
    this.waiting = setTimeout(() => this.ask(), WAIT);
  }

  drag(event) {
    if (event.button !== 0) return;
    event.preventDefault();
    const frame = this.layer.getBoundingClientRect();
    const at = ({ clientX, clientY }) => [
      within((clientX - frame.left) / frame.width, 0, 1),
      within((clientY - frame.top) / frame.height, 0, 1),
    ];
    const before = this.ends;
    const from = at(event);
    this.layer.setPointerCapture(event.pointerId);
    const move = (moved) => {
      const to = at(moved);
      this.set([0, 1].map((axis) => Math.min(from[axis], to[axis])).concat([0, 1].map((axis) => Math.max(from[axis], to[axis]))));
    };
    const end = (ended) => {
      this.layer.removeEventListener("pointermove", move);
      this.layer.removeEventListener("pointerup", end);
      this.layer.removeEventListener("pointercancel", end);
      const [x0, y0, x1, y1] = this.ends;
      const small = x1 - x0 < LEAST || y1 - y0 < LEAST;
      if (small || ended.type === "pointercancel") this.set(before); // A click is no box.
      else this.ask();
      this.box.focus({ preventScroll: true });
    };
    this.layer.addEventListener("pointermove", move);
    this.layer.addEventListener("pointerup", end);
    this.layer.addEventListener("pointercancel", end);
  }
}
