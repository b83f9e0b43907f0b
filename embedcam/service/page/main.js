/* The page: what is asked, what is looked at, and what follows from it.

   What is looked at is one of: the whole answer; a result (pinned, or pointed at meanwhile); a point
   of the query; a part of it, in a box; two results compared. `look` draws it, and is called whenever anything changes. */

import { BoxView } from "./box.js";
import { announce, find, make } from "./dom.js";
import { startIntake } from "./intake.js";
import { mapOf } from "./maps.js";
import { showContrast, showGuide, showPicked, showReceipt, showState } from "./panel.js";
import { QueryView, showMatch, showTrust } from "./query.js";
import { Card, drawOwn, drawPart, drawPoint, drawSome, loadAll, prepared, showCards, showWaiting } from "./results.js";
import { about, compare, examples, explain, explainWords, picture, pictureAddress } from "./service.js";
import { WordsCard, drawAnswers, noteAnswers, offerText, showAsked, startText } from "./text.js";
import { startTheme } from "./theme.js";
import { counted, described, fixed, nameOf, placeOf, sentence, shortened, signed } from "./words.js";

const TOGETHER = 4; // Receipts asked for at a time: the first ones come soon.
const COUNTS = [3, 5, 10, 15, 20, 30, 50];
const PICTURE_SIDE = 1024; // Of an indexed image that is searched with.
const LEAVING = 180; // Milliseconds that a result stays in view after the mouse has left it.

const query = new QueryView(choosePoint);
const boxed = new BoxView(query.shot, chooseBox);
const known = { blob: null, id: null, words: null, retry: null, answer: null, cards: [], usual: 5, count: null, detail: {} };
const at = { hovered: null, last: null, pinned: null, point: null, picked: [], contrast: null, part: null };
let work = new AbortController();
let leaving = 0;
let returning = false;

// What is asked

/** @param id of the indexed image that it is; null for a picture of the visitor's own */
async function begin(blob, id = null) {
  Object.assign(known, { blob, id, words: null, retry: lookUp });
  find("query-title").textContent = id === null ? "Your picture" : `From the index: ${shortened(id)}`;
  showAddress(id === null ? {} : { id });
  known.cards.forEach((card) => card.forget());
  Object.assign(known, { answer: null, cards: [] });
  query.begin(blob);
  await lookUp();
}

/** Lets go of what was asked before; returns the signal of what is asked now. */
function anew() {
  work.abort();
  work = new AbortController();
  return work.signal;
}

/** Begins with an indexed image. */
async function beginWith(id) {
  const signal = anew();
  Object.assign(known, { id, words: null, answer: null, retry: () => beginWith(id) });
  showAddress({ id });
  try {
    await begin(await picture(pictureAddress(id), PICTURE_SIDE, signal), id);
  } catch (error) {
    if (!signal.aborted) fail(error);
  }
}

/** Begins with words; `above` are those that they are held against, or null. */
async function beginWords(text, above = null) {
  const signal = anew();
  known.cards.forEach((card) => card.forget());
  const words = above === null ? { text } : { text, above };
  Object.assign(known, { blob: null, id: null, words, answer: null, cards: [], retry: () => beginWords(text, above) });
  showAddress(words);
  showAsked(text, above);
  stage("asking"); // Only what is shown takes the focus.
  find("ask-again").elements.text.focus({ preventScroll: true });
  showAsking();
  let answer;
  try {
    answer = await explainWords(text, above, known.count, signal);
  } catch (error) {
    if (!signal.aborted) fail(error);
    return;
  }
  const cards = answer.neighbors.map((one, place) => new WordsCard(one, place + 1, searchWith));
  known.cards = cards;
  noteAnswers(answer);
  showCards(cards);
  drawAnswers(cards, above !== null);
  stage("answered");
  announce(`${counted(cards.length, "result")}. Nearest: ${cards[0].told()}. ${find("words-note").textContent}`);
  await loadAll(cards, signal, () => {});
}

function showAsking() {
  stage("asking");
  announce("Looking it up");
  showWaiting(known.count ?? known.usual);
}

/** Asks, of the picture that there is, for as many results as are wanted. */
async function lookUp() {
  const signal = anew();
  lookAway();
  showAsking();
  try {
    known.answer = await explain(known.blob, known.count, signal, known.detail);
  } catch (error) {
    if (!signal.aborted) fail(error);
    return;
  }
  const before = new Map(known.cards.map((card) => [card.result.id, card]));
  known.cards = known.answer.neighbors.map((one, place) => before.get(one.id) ?? new Card(one, place + 1, heard));
  for (const card of before.values()) if (!known.cards.includes(card)) card.forget();
  query.answered(known.answer);
  showMatch(known.answer);
  showTrust(known.answer);
  showCards(known.cards);
  stage("answered");
  look();
  announce(`${counted(known.cards.length, "result")}. Nearest: ${described(known.cards[0].result, 1)}. ${find("trust").hidden ? "" : find("trust-words").textContent}`);
  const fresh = known.cards.filter((card) => card.address === null);
  await Promise.all([addUp(signal), loadAll(fresh, signal, soon)]);
}

function* fewAtATime(cards) {
  for (let start = 0; start < cards.length; start += TOGETHER) yield cards.slice(start, start + TOGETHER);
}

/** Receipts, nearest first, a few at a time. */
async function addUp(signal) {
  for (const some of fewAtATime(known.cards.filter((card) => card.receipt === null))) {
    await settle(some, signal);
    if (signal.aborted) return;
    const first = known.cards.find((card) => card.receipt !== null);
    if (first) query.setCells(first.receipt.queryMap);
    look();
  }
}

/** The receipts of some; where one of them cannot be made, of each by itself. */
async function settle(cards, signal) {
  try {
    const { receipts } = await compare(known.blob, cards.map((card) => card.result.id), {}, signal);
    receipts.forEach((receipt, place) => cards[place].setReceipt(receipt));
  } catch (error) {
    if (signal.aborted) return;
    const ofAll = error.passing || error.status === 501; // Not of one picture among them.
    if (ofAll || cards.length === 1) for (const card of cards) card.trouble = error.message;
    else for (const card of cards) await settle([card], signal);
  }
}

function fail(error) {
  // Said of a file the service calls it "the picture: ...".
  find("problem-text").textContent = sentence(error.message.replace(/^the picture: /, "the picture "));
  find("retry").hidden = error.passing === false;
  stage("failed");
  if (error.passing) find("retry").focus();
}

function stage(name) {
  const words = known.words !== null && name !== "empty";
  document.body.dataset.stage = name;
  document.body.dataset.asked = words ? "words" : "picture";
  find("intake").hidden = name !== "empty";
  find("query").hidden = words || name === "empty" || name === "failed";
  find("words").hidden = !words;
  find("results").hidden = name === "empty";
  find("again").hidden = name === "empty";
  find("panel").hidden = words || name !== "answered";
  find("picture-hint").hidden = words;
  find("problem").hidden = name !== "failed";
  find("legend").hidden = name !== "answered";
  find("grid").hidden = name === "failed";
  if (name !== "answered") {
    find("part").hidden = true;
    find("match").hidden = true;
    find("trust").hidden = true;
    find("back").hidden = true;
    find("note").textContent = name === "asking" ? "Looking it up …" : "";
  }
}

// What is looked at

let waiting = false;

/** `look`, once for all that comes in the same moment. */
function soon() {
  if (waiting) return;
  waiting = true;
  requestAnimationFrame(() => {
    waiting = false;
    look();
  });
}

function look() {
  if (known.answer === null || document.body.dataset.stage !== "answered") return;
  const { point, pinned, contrast } = at;
  if (contrast !== null) lookAtTwo();
  else if (point !== null) lookAtPoint(point);
  else if (at.part !== null) lookAtPart(pinned ?? at.hovered);
  else lookAtResult(pinned ?? at.hovered);
  find("part").hidden = known.cards.every((card) => card.receipt === null);
  mark();
}

function lookAtResult(card) {
  if (card === null) {
    query.showOwn();
    drawOwn(known.cards);
    tell(known.answer.empty ? "Nothing in your picture speaks for these results." : "Bright parts speak for these results.", "one");
  } else {
    if (card.receipt === null) query.showOwn();
    else query.showSigned(card.receipt.queryMap);
    drawSome(known.cards, card.receipt === null ? [] : [card]);
    tell(`Red speaks for result ${card.rank}, blue against it.`, card.receipt === null ? "one" : "two");
  }
  lookAtPanel(card ?? at.last);
}

function lookAtPanel(card) {
  if (at.picked.length === 1) showPicked(at.picked[0], back);
  else if (card === null) showGuide(known.cards.every((one) => one.receipt !== null || one.trouble !== null));
  else {
    const receipt = at.part?.receipts.get(card);
    const asked = { search: () => searchWith(card.result.id), close: back };
    showReceipt(card, query, receipt ? { ...asked, receipt, boxed: true } : asked);
  }
}

/** What the box's part of the query matches; of one result its own evidence, too. */
function lookAtPart(card) {
  const { receipts, trouble } = at.part;
  const receipt = receipts.get(card);
  if (receipt) query.showSigned(receipt.queryMap);
  else query.showNothing();
  drawPart(known.cards, receipts);
  tell(trouble ?? "Red in the results matches what is in the box.", "two");
  lookAtPanel(card ?? at.last);
}

function lookAtPoint({ row, column }) {
  query.showPoint(row, column);
  drawPoint(known.cards, row, column);
  tell(`What in the results matches ${placeOf(row, column)}.`, "one");
}

function lookAtTwo() {
  const { above, below, answer, trouble, stored } = at.contrast;
  const title = `Why ${above.rank} is above ${below.rank}`;
  const pair = [above, below].filter((card) => card.receipt !== null);
  drawSome(known.cards, pair, below);
  if (answer === null) {
    query.showOwn();
    tell("", "one");
    showState(title, trouble?.message ?? "Comparing them …", trouble === null, back, trouble?.passing ? contrastThem : null);
  } else {
    const asked = { close: back, change: changeMap, stored: stored !== null };
    query.showSigned(showContrast(above, below, query, answer, asked));
    tell(`Red speaks for result ${above.rank}, blue for result ${below.rank}.`, "two");
  }
  if (stored === null) return;
  query.showPlain(stored.map);
  tell(stored.empty ?? `Bright parts speak for result ${above.rank} rather than result ${below.rank}.`, "one");
}

function tell(note, scale) {
  find("note").textContent = note;
  find("legend").dataset.scale = scale;
  find("legend-low").textContent = scale === "one" ? "no evidence" : "against";
  find("legend-high").textContent = scale === "one" ? "strongest" : "for";
}

/** Which buttons are down, and what is in the background. */
function mark() {
  const { pinned, hovered, contrast, picked, point } = at;
  const busy = pinned !== null || contrast !== null;
  document.body.dataset.sheet = busy ? "open" : picked.length > 0 ? "low" : "shut";
  find("back").hidden = !(busy || point !== null || at.part !== null);
  for (const card of known.cards) {
    const two = contrast !== null && (card === contrast.above || card === contrast.below);
    const inView = two || card === pinned || (!busy && point === null && card === hovered);
    card.button.setAttribute("aria-pressed", String(card === pinned));
    card.pick.setAttribute("aria-pressed", String(picked.includes(card)));
    card.element.classList.toggle("lit", inView);
    card.element.classList.toggle("dim", busy && !inView);
    card.element.classList.toggle("for", contrast !== null && card === contrast.above);
    card.element.classList.toggle("against", contrast !== null && card === contrast.below);
  }
}

// What people do

function heard(what, card, event) {
  if (returning) return;
  if (what === "hover" && event.pointerType !== "touch") hover(card);
  else if (what === "leave") leave();
  else if (what === "choose") pin(card, event.detail === 0);
  else if (what === "pick") pick(card);
}

function hover(card) {
  clearTimeout(leaving);
  if (at.hovered === card) return;
  at.hovered = at.last = card;
  if (at.point !== null) lookAtPanel(card);
  else if (at.pinned === null && at.contrast === null) look();
}

function leave() {
  clearTimeout(leaving);
  leaving = setTimeout(() => {
    at.hovered = null;
    if (at.pinned === null && at.contrast === null && at.point === null) look();
  }, LEAVING);
}

function pin(card, byKey) {
  const same = at.pinned === card;
  Object.assign(at, { pinned: same ? null : card, last: card, point: null, picked: [], contrast: null });
  look();
  if (same) return;
  const { receipt } = card;
  announce(receipt === null ? "" : `Receipt of result ${card.rank}: similarity ${fixed(receipt.similarity)}, of which ${fixed(receipt.shared)} is shared with the average image.`);
  if (byKey) find("panel-title").focus();
}

function pick(card) {
  const others = at.picked.filter((one) => one !== card);
  const picked = others.length < at.picked.length ? others : [...others.slice(-1), card];
  noBox();
  Object.assign(at, { picked, pinned: null, point: null, contrast: null, last: null, hovered: null });
  if (picked.length === 2) contrastThem();
  else {
    look();
    announce(picked.length === 1 ? `Result ${card.rank} is picked. Press Compare on another one.` : "Nothing is compared.");
  }
}

async function contrastThem() {
  const [above, below] = [...at.picked].sort((one, other) => one.rank - other.rank);
  const mine = { above, below, answer: null, trouble: null, stored: null };
  at.contrast = mine;
  look();
  const { signal } = work;
  try {
    const asked = { rival: below.result.id };
    mine.answer = await compare(known.blob, [above.result.id], asked, signal);
    const [first, second] = mine.answer.receipts;
    if (above.receipt === null) above.setReceipt(first);
    if (below.receipt === null) below.setReceipt(second);
  } catch (error) {
    if (signal.aborted) return;
    mine.trouble = error;
  }
  if (at.contrast !== mine) return;
  look();
  const { contrast } = mine.answer ?? {};
  announce(contrast ? `Result ${above.rank} is nearer than result ${below.rank} by ${fixed(contrast.score)}.` : sentence(mine.trouble.message));
  if (mine.trouble?.status === 501) await askStored(mine); // No receipts, but weights there are.
}

/** The query's map of two that are compared: by the receipt, or by the weights the index stores. */
async function changeMap() {
  const mine = at.contrast;
  if (mine.stored === null) await askStored(mine);
  else {
    mine.stored = null;
    look();
  }
  if (at.contrast === mine) find("stored")?.focus();
}

async function askStored(mine) {
  const { signal } = work;
  try {
    const named = { result: mine.above.result.id, rival: mine.below.result.id };
    const { cam, why_empty: why } = await explain(known.blob, 1, signal, { ...named, ...known.detail });
    mine.stored = { map: mapOf(cam), empty: why === null ? null : sentence(why) };
  } catch (error) {
    if (!signal.aborted && at.contrast === mine) tell(sentence(error.message), "two");
    return;
  }
  if (at.contrast !== mine) return;
  look();
  announce(find("note").textContent);
}

function choosePoint(row, column) {
  const start = performance.now();
  if (at.point?.row === row && at.point.column === column) return;
  noBox();
  Object.assign(at, { point: { row, column }, pinned: null, picked: [], contrast: null });
  look();
  performance.measure("embedcam: point", { start });
  const missing = known.cards.filter((card) => card.receipt !== null && card.matched(row, column) === null);
  if (missing.length > 0) askPoint(row, column, missing);
  else sayPoint(row, column);
}

/** What is in the box, as shares of the picture, is asked about; null for no box. */
async function chooseBox(ends) {
  const mine = ends === null ? null : { receipts: new Map(), trouble: null };
  at.part = mine;
  if (mine !== null) Object.assign(at, { point: null, picked: [], contrast: null });
  look();
  if (mine === null) return;
  const { signal } = work;
  const { width, height } = query.shot.size;
  const words = boxed.words(); // Of this box, wherever it is moved to meanwhile.
  const box = ends.map((end, axis) => (end * (axis % 2 === 0 ? width : height)).toFixed(1)).join(",");
  const cards = known.cards.filter((card) => card.receipt !== null);
  for (const some of fewAtATime(cards)) {
    try {
      const found = await compare(known.blob, some.map((card) => card.result.id), { box, links: 0 }, signal);
      found.receipts.forEach((receipt, place) => mine.receipts.set(some[place], prepared(receipt)));
    } catch (error) {
      mine.trouble = sentence(error.message);
    }
    if (signal.aborted || at.part !== mine) return;
    look();
    if (mine.trouble !== null) return;
  }
  const best = [...mine.receipts]
    .map(([card, { queryMap }]) => ({ card, value: queryMap.values.reduce((total, value) => total + value, 0) }))
    .sort((one, other) => other.value - one.value)[0];
  announce(`${words}. Result ${best.card.rank} has most of it, ${signed(best.value)}.`);
}

function noBox() {
  at.part = null;
  boxed.clear(true);
}

/** Where receipts are not exact, the service follows the point through the network. */
async function askPoint(row, column, cards) {
  const { signal } = work;
  find("note").textContent = `Following ${placeOf(row, column)} …`;
  for (const some of fewAtATime(cards)) {
    try {
      const found = await compare(known.blob, some.map((card) => card.result.id), { cell: `${row},${column}`, links: 0 }, signal);
      found.receipts.forEach((receipt, place) => some[place].setMatched(row, column, receipt.point));
    } catch (error) {
      if (signal.aborted || at.point?.row !== row || at.point.column !== column) return;
      find("note").textContent = sentence(error.message);
      return;
    }
    if (signal.aborted || at.point?.row !== row || at.point.column !== column) return;
    look();
  }
  sayPoint(row, column);
}

function sayPoint(row, column) {
  const best = known.cards
    .map((card) => ({ card, map: card.matched(row, column) }))
    .filter(({ map }) => map !== null)
    .map(({ card, map }) => ({ card, value: Math.max(...map.values) }))
    .sort((one, other) => other.value - one.value)[0];
  if (best === undefined) return;
  const found = best.value > 0 ? `Result ${best.card.rank} matches best, ${signed(best.value, 4)}.` : "No result has anything that matches.";
  announce(`${placeOf(row, column)}. ${found}`);
}

async function searchWith(id) {
  await beginWith(id);
  find("results").focus();
}

/** Nothing in particular is looked at. */
function lookAway() {
  noBox();
  Object.assign(at, { hovered: null, last: null, pinned: null, point: null, picked: [], contrast: null });
}

/** One step out of whatever is looked at. */
function back() {
  const before = at.pinned;
  const within = find("panel").contains(document.activeElement);
  lookAway();
  look();
  if (before === null || !within) return;
  returning = true; // The focus alone is no wish to see it again.
  before.button.focus();
  returning = false;
}

// The address: #id=... is an indexed image, #text=... words, and can be handed on

function addressed() {
  return new URLSearchParams(location.hash.slice(1));
}

function showAddress(named) {
  const wanted = new URLSearchParams(named).toString();
  if (addressed().toString() === wanted) return;
  const hash = wanted === "" ? "" : `#${wanted}`;
  history.pushState(null, "", `${location.pathname}${location.search}${hash}`);
}

function startAddress() {
  const follow = () => {
    const [id, text, above] = ["id", "text", "above"].map((name) => addressed().get(name) || null);
    const same = id === known.id && text === (known.words?.text ?? null) && above === (known.words?.above ?? null);
    if (same || (id === null && text === null && location.hash !== "")) return;
    if (id !== null) beginWith(id);
    else if (text !== null) beginWords(text, above);
    else {
      work.abort();
      Object.assign(known, { id: null, words: null });
      stage("empty");
    }
  };
  addEventListener("popstate", follow);
  follow();
}

async function startTries() {
  const tries = (await examples()).map((one) => {
    const name = nameOf(one);
    const image = make("img", { src: `${one.image_url}?size=160`, alt: name });
    const item = make("li", {}, make("button", { type: "button", class: "try", "aria-label": `Search with ${name}`, click: () => beginWith(one.id) }, image));
    image.addEventListener("error", () => item.remove());
    return item;
  });
  find("tries-row").replaceChildren(...tries);
  find("tries").hidden = tries.length === 0;
}

// Begin

function startControls() {
  const strength = find("strength");
  const show = () => {
    document.documentElement.style.setProperty("--overlay", String(strength.value / 100));
    find("strength-shown").textContent = `${strength.value}%`;
  };
  strength.addEventListener("input", show);
  show();
  find("count").addEventListener("change", (event) => {
    known.count = Number(event.target.value);
    lookUp();
  });
  find("finer").addEventListener("change", (event) => {
    known.detail = event.target.checked ? { detail: "2" } : {};
    lookUp();
  });
  find("retry").addEventListener("click", () => known.retry());
  find("back").addEventListener("click", back);
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape") back();
  });
}

async function startAbout() {
  const { images, most, usual, words } = await about();
  offerText(words);
  if (images !== null) find("about").textContent = counted(images, "image");
  known.usual = usual ?? known.usual;
  const limit = Math.min(most ?? 100, images ?? Infinity);
  const counts = [...new Set([...COUNTS, known.usual])].filter((one) => one <= limit).sort((a, b) => a - b);
  const options = (counts.length > 0 ? counts : [limit]).map((one) => new Option(String(one), String(one), one === known.usual, one === known.usual));
  find("count").replaceChildren(...options);
}

startTheme();
startControls();
startIntake(begin);
startText(beginWords);
startAbout();
startTries();
startAddress();
