/* What the page asks of the service. Addresses are relative: a proxy may serve it below a path. */

const RETRIES = 4;
const LONGEST_WAIT = 5;

/** What the service refused, in its own sentence; or that it did not answer. */
export class Refusal extends Error {
  constructor(message, status, code, wait) {
    super(message);
    this.status = status;
    this.code = code;
    this.wait = wait;
  }

  /** Whether the same may go well in a moment. */
  get passing() {
    return this.status === 0 || this.status === 503 || this.status === 408;
  }
}

async function ask(address, options) {
  let answer;
  try {
    answer = await fetch(address, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refusal("The service does not answer. Is it still running?", 0, "no_answer", 1);
  }
  if (answer.ok) return answer;
  let told = null;
  try {
    told = (await answer.json()).error;
  } catch {
    // Something between the page and the service answered in words of its own.
  }
  const wait = Number(answer.headers.get("Retry-After")) || 1;
  const words = told?.message ?? `The service answered with status ${answer.status}`;
  throw new Refusal(words, answer.status, told?.code ?? "unknown", wait);
}

/** As `ask`, and again after a while where the service is busy: nobody waits before a button. */
async function askPatiently(address, options) {
  for (let tries = 0; ; tries += 1) {
    try {
      return await ask(address, options);
    } catch (error) {
      if (error.status !== 503 || tries >= RETRIES) throw error;
      await pause(Math.min(error.wait, LONGEST_WAIT), options.signal);
    }
  }
}

function pause(seconds, signal) {
  return new Promise((done, stop) => {
    const timer = setTimeout(done, 1000 * seconds);
    signal?.addEventListener("abort", () => {
      clearTimeout(timer);
      stop(signal.reason);
    });
  });
}

function posted(picture, signal) {
  const body = new FormData();
  body.append("image", picture, "query");
  return { method: "POST", body, headers: { Accept: "application/json" }, signal };
}

/** The results of a picture, and the maps; `more` are other parameters: result, rival, detail. */
export async function explain(picture, count, signal, more = {}) {
  const wanted = new URLSearchParams({ map_size: "56", ...more });
  if (count !== null) wanted.set("n_neighbors", String(count));
  return (await ask(`explain?${wanted}`, posted(picture, signal))).json();
}

/** The pictures that answer words, and where; `above` are other words to tell them from, or null. */
export async function explainWords(text, above, count, signal) {
  const wanted = new URLSearchParams({ map_size: "56" });
  if (count !== null) wanted.set("n_neighbors", String(count));
  const headers = { Accept: "application/json", "Content-Type": "application/json" };
  const body = JSON.stringify(above === null ? { text } : { text, above });
  return (await askPatiently(`explain?${wanted}`, { method: "POST", body, headers, signal })).json();
}

/** Receipts of results; `more` are other parameters: rival, or cell. */
export async function compare(picture, ids, more, signal) {
  const wanted = new URLSearchParams(more);
  for (const id of ids) wanted.append("result", id);
  return (await askPatiently(`compare?${wanted}`, posted(picture, signal))).json();
}

/** An indexed image's picture, as a blob. */
export async function picture(address, side, signal) {
  const headers = { Accept: "image/webp,image/jpeg" };
  return (await askPatiently(`${address}?size=${side}`, { headers, signal })).blob();
}

/** Where an indexed image's picture is; see `item_url` of the service. */
export function pictureAddress(id) {
  const parts = id.toWellFormed().split("/").map(encodeURIComponent);
  const odd = parts.some((part) => ["", ".", ".."].includes(part));
  return `items/${parts.join(odd ? "%2F" : "/")}/image`;
}

/** A few indexed images; none where it is not told. */
export async function examples() {
  try {
    return (await (await ask("examples")).json()).items;
  } catch {
    return []; // The page works without.
  }
}

/** An indexed image's own map, and what of the picture it covers. */
export async function ownMap(address, signal) {
  const headers = { Accept: "application/json" };
  return (await askPatiently(address, { headers, signal })).json();
}

/** How many images there are, how many results may be asked for (null where it is not told), and
    whether a query may be words. */
export async function about() {
  const found = { images: null, most: null, usual: null, words: false };
  try {
    const [described, ready] = await Promise.all(["openapi.json", "readyz"].map((one) => fetch(one)));
    const asked = (await described.json()).paths["/explain"].post.parameters;
    const { schema } = asked.find((one) => one.name === "n_neighbors");
    found.most = schema.maximum ?? null;
    found.usual = schema.default ?? null;
    if (ready.ok) Object.assign(found, await ready.json());
  } catch {
    // The page works without.
  }
  return found;
}
