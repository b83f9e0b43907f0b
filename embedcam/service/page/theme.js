/* Light or dark: as the system says, until somebody says otherwise here. */

import { find } from "./dom.js";

const KEY = "embedcam-theme";
const system = matchMedia("(prefers-color-scheme: dark)");

function kept() {
  try {
    return localStorage.getItem(KEY);
  } catch {
    return null; // Storage is switched off.
  }
}

function keep(theme) {
  try {
    localStorage.setItem(KEY, theme);
  } catch {
    // It lasts as long as the page.
  }
}

function isDark() {
  const chosen = document.documentElement.dataset.theme;
  return chosen ? chosen === "dark" : system.matches;
}

function label() {
  const other = isDark() ? "light" : "dark";
  const button = find("theme");
  button.setAttribute("aria-label", `Use ${other} colours`);
  button.title = `Use ${other} colours`;
}

/** Puts the button to work. */
export function startTheme() {
  const chosen = kept();
  if (chosen === "light" || chosen === "dark") document.documentElement.dataset.theme = chosen;
  find("theme").addEventListener("click", () => {
    const theme = isDark() ? "light" : "dark";
    document.documentElement.dataset.theme = theme;
    keep(theme);
    label();
  });
  system.addEventListener("change", label);
  label();
}
