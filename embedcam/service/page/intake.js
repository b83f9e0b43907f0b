/* Ways for a picture to come in: dropped, picked or pasted. */

import { find } from "./dom.js";

function pictureIn(transfer) {
  const files = [...(transfer?.files ?? [])];
  // Some systems name no type; the service looks at the bytes anyway.
  return files.find((file) => file.type.startsWith("image/")) ?? files[0] ?? null;
}

/** Calls back with every file that comes. */
export function startIntake(taken) {
  const input = find("file");
  input.addEventListener("change", () => {
    const [file] = input.files;
    input.value = ""; // The same file may be picked again.
    if (file) taken(file);
  });
  for (const button of document.querySelectorAll("[data-pick]")) {
    button.addEventListener("click", () => input.click());
  }
  document.addEventListener("paste", (event) => {
    const file = pictureIn(event.clipboardData);
    if (file) {
      event.preventDefault();
      taken(file);
    }
  });
  startDrops(taken);
}

function startDrops(taken) {
  const sign = find("dropping");
  let inside = 0;
  const show = (depth) => {
    inside = Math.max(depth, 0);
    sign.hidden = inside === 0;
  };
  const holds = (event) => event.dataTransfer?.types.includes("Files");
  document.addEventListener("dragenter", (event) => {
    if (holds(event)) show(inside + 1);
  });
  document.addEventListener("dragleave", (event) => {
    if (holds(event)) show(inside - 1);
  });
  document.addEventListener("dragover", (event) => {
    if (!holds(event)) return;
    event.preventDefault(); // Or the browser opens the file.
    event.dataTransfer.dropEffect = "copy";
  });
  document.addEventListener("drop", (event) => {
    if (!holds(event)) return;
    event.preventDefault();
    show(0);
    const file = pictureIn(event.dataTransfer);
    if (file) taken(file);
  });
}
