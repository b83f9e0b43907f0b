/* Places that match: outlines in both pictures, and the regions cut out side by side. */

import { draw, make } from "./dom.js";
import { shortened, signed, whereOf } from "./words.js";

const MARGIN = 1.1; // Of a region's longer side, what is shown around it too.

/** The lines around cells of a grid, as a path over a box [x0, y0, x1, y1]. */
function outline(cells, shape, [x0, y0, x1, y1]) {
  const inside = new Set(cells.map(([row, column]) => row * shape.columns + column));
  const has = (row, column) => column >= 0 && column < shape.columns && inside.has(row * shape.columns + column);
  const x = (column) => (x0 + (column / shape.columns) * (x1 - x0)).toFixed(2);
  const y = (row) => (y0 + (row / shape.rows) * (y1 - y0)).toFixed(2);
  const lines = [];
  for (const [row, column] of cells) {
    if (!has(row - 1, column)) lines.push(`M${x(column)} ${y(row)}H${x(column + 1)}`);
    if (!has(row + 1, column)) lines.push(`M${x(column)} ${y(row + 1)}H${x(column + 1)}`);
    if (!has(row, column - 1)) lines.push(`M${x(column)} ${y(row)}V${y(row + 1)}`);
    if (!has(row, column + 1)) lines.push(`M${x(column + 1)} ${y(row)}V${y(row + 1)}`);
  }
  return lines.join("");
}

function drawn(path, number) {
  return draw("g", { class: `link link-${number % 5}` },
    draw("path", { d: path, class: "under", "vector-effect": "non-scaling-stroke" }),
    draw("path", { d: path, "vector-effect": "non-scaling-stroke" }));
}

const shapeOf = (map) => ({ rows: map.rows, columns: map.columns });

/** Lays numbered outlines over a shot; a region that several places share is drawn once. */
export function outlineAll(shot, regions, map) {
  const { width, height } = shot.size;
  const shape = shapeOf(map);
  const layer = draw("svg", { class: "outlines", "aria-hidden": "true", viewBox: `0 0 ${width} ${height}`, preserveAspectRatio: "none" });
  const known = new Map();
  regions.forEach((region, number) => {
    const key = JSON.stringify(region.cells);
    known.set(key, [...(known.get(key) ?? []), number]);
  });
  for (const numbers of known.values()) {
    const { cells } = regions[numbers[0]];
    layer.append(drawn(outline(cells, shape, shot.extent), numbers[0]));
    const middle = cells.reduce((sum, [row, column]) => [sum[0] + row + 0.5, sum[1] + column + 0.5], [0, 0])
      .map((total) => total / cells.length);
    const [x0, y0, x1, y1] = shot.extent;
    const left = (100 * (x0 + (middle[1] / shape.columns) * (x1 - x0))) / width;
    const top = (100 * (y0 + (middle[0] / shape.rows) * (y1 - y0))) / height;
    const label = make("span", { class: "numbers", "aria-hidden": "true" }, ...numbers.map(disc));
    Object.assign(label.style, { left: `${left}%`, top: `${top}%` });
    shot.element.append(label);
  }
  shot.element.append(layer);
}

function disc(number) {
  return make("b", { class: `disc link-${number % 5}`, text: String(number + 1) });
}

/** The square around a region of a picture. */
function cutOut(shot, address, region, map, number, alt) {
  const { width, height } = shot.size;
  const [x0, y0, x1, y1] = shot.extent;
  const box = region.box.map((end, at) => (at % 2 === 0 ? x0 + end * (x1 - x0) : y0 + end * (y1 - y0)));
  const side = Math.min(MARGIN * Math.max(box[2] - box[0], box[3] - box[1]), Math.max(width, height));
  const corner = [0, 1].map((axis) => {
    const most = Math.max((axis === 0 ? width : height) - side, 0);
    return Math.min(Math.max((box[axis] + box[axis + 2] - side) / 2, 0), most);
  });
  const frame = make("span", { class: "crop" });
  if (address !== null) {
    const image = make("img", { src: address, alt, draggable: "false" });
    Object.assign(image.style, {
      width: `${(100 * width) / side}%`,
      height: `${(100 * height) / side}%`,
      left: `${(-100 * corner[0]) / side}%`,
      top: `${(-100 * corner[1]) / side}%`,
    });
    frame.append(image);
  }
  const layer = draw("svg", { "aria-hidden": "true", viewBox: `${corner[0]} ${corner[1]} ${side} ${side}` },
    drawn(outline(region.cells, shapeOf(map), shot.extent), number));
  frame.append(layer);
  return frame;
}

/** A list of places: the regions of both pictures, what they give, and the same in words. */
export function placeList(receipt, mine, theirs) {
  const rows = receipt.places.map((place, number) => {
    const share = place.share === null ? signed(place.contribution) : `${Math.round(100 * place.share)}%`;
    const ours = whereOf(place.query.cells, receipt.queryMap);
    const other = whereOf(place.result.cells, receipt.resultMap);
    const words = `The ${ours} of your picture matches the ${other} of the result: ${share} of what they share beyond the average`;
    return make("li", { class: "place" },
      make("span", { class: "unseen", text: words }),
      make("span", { class: "shown", "aria-hidden": "true" },
        disc(number),
        cutOut(mine.shot, mine.address, place.query, receipt.queryMap, number, `${ours} of your picture`),
        cutOut(theirs.shot, theirs.address, place.result, receipt.resultMap, number, `${other} of the result`),
        make("span", { class: "share" }, make("b", { text: share }), make("span", { text: signed(place.contribution) }))));
  });
  return make("ol", { class: "places", "aria-label": "Places that match, most first" }, ...rows);
}

/** How much of what the two share these places carry. */
export function carried({ places }, boxed) {
  const share = places.reduce((total, place) => total + (place.share ?? 0), 0);
  const whose = boxed ? "the box and the result" : "the two";
  const than = share > 1 ? "; the other places speak against it" : "";
  return `Together ${Math.round(100 * share)}% of what ${whose} share beyond the average picture${than}.`;
}

/** Small pictures of where a channel or concept answers most. */
export function exemplarsOf(line) {
  const shown = (line.exemplars ?? []).map((one) => {
    const image = make("img", { src: `${one.crop_url}&size=96`, alt: `it answers in ${shortened(one.id)}`, loading: "lazy", draggable: "false" });
    image.addEventListener("error", () => image.remove());
    return image;
  });
  return shown.length === 0 ? null : make("span", { class: "exemplars" }, ...shown);
}
