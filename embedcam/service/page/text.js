/* Words in place of a picture: the boxes they are typed into, and the pictures that answer them. */

import { find, make } from "./dom.js";
import { mapOf, peak, strongest } from "./maps.js";
import { caption } from "./results.js";
import { picture } from "./service.js";
import { Shot } from "./shot.js";
import { clean, described, fixed, placeOf, sentence, shortened } from "./words.js";

const PICTURE_SIDE = 512;

/** Calls back with a text, and what it is held against or null, whenever words are sent. */
export function startText(asked) {
  for (const form of document.querySelectorAll("form.ask")) {
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      const given = new FormData(form);
      const [text, above] = ["text", "above"].map((name) => (given.get(name) ?? "").trim());
      if (text === "") form.elements.text.focus();
      else asked(text, above === "" || above === text ? null : above);
    });
  }
}

/** Shows the boxes where the service takes words. */
export function offerText(words) {
  find("ask-first").hidden = !words;
}

/** Says in the column of the query what was asked. */
export function showAsked(text, above) {
  const form = find("ask-again");
  form.elements.text.value = text;
  form.elements.above.value = above ?? "";
  find("words-legend").dataset.scale = above === null ? "one" : "two";
  find("words-low").textContent = above === null ? "no evidence" : shortened(above, 24);
  find("words-high").textContent = above === null ? "strongest" : shortened(text, 24);
  find("words-note").textContent = "Looking it up …";
}

/** A picture that words found, and where it answers them. */
export class WordsCard {
  /**
   * @param result as the service says it
   * @param rank from 1
   * @param search called with the id of an image that is to be searched with
   */
  constructor(result, rank, search) {
    this.result = result;
    this.rank = rank;
    this.address = null;
    this.map = result.cam === null ? null : mapOf(result.signed_cam ?? result.cam);
    this.shot = new Shot();
    if (result.picture !== null) this.shot.setSize(result.picture, result.extent);
    if (result.file === "changed") this.shot.setStrip("Changed since the build");
    this.build(search);
  }

  build(search) {
    const { result, rank } = this;
    this.button = make(
      "button",
      { type: "button", class: "frame", "aria-label": `${this.told()}. Search with this picture`, click: () => search(result.id) },
      this.shot.element,
      make("span", { class: "rank", "aria-hidden": "true", text: String(rank) }),
    );
    const rival = result.rival_similarity ?? null;
    const order = rival > result.similarity ? "below" : "above";
    const numbers = rival === null ? fixed(result.similarity) : `${fixed(result.similarity)} ${order} ${fixed(rival)}`;
    this.element = make("li", { class: "card" }, this.button, caption(result, numbers));
  }

  /** The card in words: where the map is strongest, too, for those who do not see it. */
  told() {
    const name = described(this.result, this.rank);
    if (this.map === null) return `${name}, its picture cannot be read`;
    const best = peak(this.map);
    return best.value > 0 ? `${name}, answers most at ${placeOf(best.row, best.column)} of ${this.map.rows} by ${this.map.columns}` : `${name}, nothing in it answers`;
  }

  /** Fetches the picture. */
  async load(signal, redraw) {
    try {
      const shown = await picture(this.result.image_url, PICTURE_SIDE, signal);
      if (signal.aborted) return;
      this.address = URL.createObjectURL(shown);
      this.shot.setPicture(this.address, described(this.result, this.rank));
    } catch (error) {
      if (signal.aborted) return;
      this.shot.setAbsent(sentence(error.message));
    }
    redraw();
  }

  forget() {
    if (this.address !== null) URL.revokeObjectURL(this.address);
  }
}

/** All maps on one scale; in two colours where two texts are held against each other. */
export function drawAnswers(cards, both) {
  const top = strongest(cards.map((card) => card.map).filter((map) => map !== null), both);
  for (const card of cards) card.shot.setMap(card.map, top, both);
}

/** Says what the maps show. */
export function noteAnswers({ text, above, centred }) {
  const colours = above === null ? `Bright parts answer “${clean(text, 80)}”.` : `Red speaks for “${clean(text, 80)}”, blue for “${clean(above, 80)}”.`;
  const missing = centred ? "" : " The index keeps no average of texts, so maps also show what any words would.";
  find("words-note").textContent = colours + missing;
}
