/* Maps over pictures, drawn as the Python side draws them: bilinear between the cells' middles,
   colour and opacity both growing with the value, nothing outside of what the network saw.

   A map is {rows, columns, values}, values row by row. Its canvas covers the extent alone; the
   strength of all overlays is one number of the style sheet, so that the slider redraws nothing. */

import { COOLWARM, INFERNO } from "./colours.js";

/** A map of rows of numbers. */
export function mapOf(lists) {
  return { rows: lists.length, columns: lists[0].length, values: lists.flat() };
}

/** What speaks for one of two results, seen from the other. */
export function opposite(map) {
  return { ...map, values: map.values.map((value) => -value) };
}

/** The largest value, or magnitude where evidence against is shown too; 0 for none. */
export function strongest(maps, both = false) {
  let top = 0;
  for (const { values } of maps) {
    for (const value of values) top = Math.max(top, both ? Math.abs(value) : value);
  }
  return top;
}

/** The row and column of the largest value. */
export function peak(map) {
  let best = 0;
  map.values.forEach((value, place) => {
    if (value > map.values[best]) best = place;
  });
  return { row: Math.floor(best / map.columns), column: best % map.columns, value: map.values[best] };
}

/**
 * Draws a map.
 * @param canvas what is drawn on
 * @param map the map, or null for none
 * @param top the value of the strongest colour
 * @param both whether negative values are shown, in blue
 * @param side of the canvas in pixels; the browser stretches it
 */
export function drawMap(canvas, map, top, both = false, side = 160) {
  if (canvas.width !== side) canvas.width = canvas.height = side;
  const context = canvas.getContext("2d");
  if (map === null || !(top > 0)) {
    context.clearRect(0, 0, side, side);
    return;
  }
  const image = context.createImageData(side, side);
  fill(image.data, map, top, both, side);
  context.putImageData(image, 0, 0);
}

/** Colours `[side side 4]` of a map. */
export function fill(data, map, top, both, side) {
  const across = axis(map.columns, side);
  const down = axis(map.rows, side);
  const { columns, values } = map;
  const lines = new Float32Array(map.rows * side);
  for (let row = 0; row < map.rows; row += 1) {
    for (let x = 0; x < side; x += 1) {
      const low = values[row * columns + across.below[x]];
      const high = values[row * columns + across.above[x]];
      lines[row * side + x] = (low + across.share[x] * (high - low)) / top;
    }
  }
  const colours = both ? COOLWARM : INFERNO;
  let at = 0;
  for (let y = 0; y < side; y += 1) {
    const first = down.below[y] * side;
    const second = down.above[y] * side;
    const share = down.share[y];
    for (let x = 0; x < side; x += 1, at += 4) {
      let value = lines[first + x] + share * (lines[second + x] - lines[first + x]);
      value = Math.min(Math.max(value, both ? -1 : 0), 1);
      const entry = 3 * Math.round(255 * (both ? (1 + value) / 2 : value));
      data[at] = colours[entry];
      data[at + 1] = colours[entry + 1];
      data[at + 2] = colours[entry + 2];
      data[at + 3] = Math.round(255 * Math.abs(value));
    }
  }
}

const axes = new Map();

/** Which cells each pixel lies between, and where. */
function axis(cells, pixels) {
  const key = `${cells} ${pixels}`;
  if (!axes.has(key)) {
    const found = {
      below: new Uint16Array(pixels),
      above: new Uint16Array(pixels),
      share: new Float32Array(pixels),
    };
    for (let pixel = 0; pixel < pixels; pixel += 1) {
      const at = Math.min(Math.max(((pixel + 0.5) / pixels) * cells - 0.5, 0), cells - 1);
      found.below[pixel] = Math.floor(at);
      found.above[pixel] = Math.min(found.below[pixel] + 1, cells - 1);
      found.share[pixel] = at - found.below[pixel];
    }
    axes.set(key, found);
  }
  return axes.get(key);
}
