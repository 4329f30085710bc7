"use strict";
// The page is complete without this: what is chosen here is only shown or hidden, and coloured.
const all = (selector, root = document) => [...root.querySelectorAll(selector)];

// Lines
for (const box of all("[data-line]"))
  box.addEventListener("change", () => {
    for (const line of all(".line-" + box.dataset.line)) line.style.display = box.checked ? "" : "none";
  });

// Texts side by side
const sides = all("select[data-side]");
function showTexts() {
  for (const text of all("[data-view]")) {
    const side = sides.findIndex((select) => select.value === text.dataset.view);
    text.hidden = side < 0;
    text.dataset.side = side;
  }
  for (const pair of all(".pair")) pair.hidden = all("[data-view]", pair).every((text) => text.hidden);
}
for (const select of sides) select.addEventListener("change", showTexts);

// Token by token
const select = document.getElementById("episode");
const figures = all("[name=figure]");
const numbersOf = (token) => token.dataset.n.split(",").map((text) => (text === "" ? NaN : Number(text)));
const shown = (x) => (Number.isNaN(x) ? "–" : String(x).replace("-", "−"));

// Two hues around a middle: below it orange, above it blue. The middle of a ratio is 1, that of a value the mean of the
// text, and that of all else 0.
const BELOW = [230, 120, 0], ABOVE = [0, 114, 178];
function tint(x, middle, reach) {
  if (Number.isNaN(x) || reach === 0) return "transparent";
  const share = Math.max(-1, Math.min(1, (x - middle) / reach));
  return `rgba(${(share < 0 ? BELOW : ABOVE).join(",")},${(0.72 * Math.abs(share)).toFixed(3)})`;
}

function paint() {
  const article = all(".episode").find((one) => !one.hidden);
  const radio = figures.find((one) => one.checked);
  const tokens = all("[data-n]", article), index = Number(radio.value);
  const values = tokens.map((token) => numbersOf(token)[index]);
  const known = values.filter((x) => !Number.isNaN(x));
  const mean = known.reduce((sum, x) => sum + x, 0) / Math.max(1, known.length);
  const middle = { ratio: 1, value: mean }[radio.dataset.name] ?? 0;
  const reach = known.reduce((most, x) => Math.max(most, Math.abs(x - middle)), 0);
  tokens.forEach((token, i) => { token.style.background = tint(values[i], middle, reach); });
  const negative = values.some((x) => x < middle);
  const low = negative ? middle - reach : middle, high = middle + reach;
  document.getElementById("low").textContent = shown(Number(low.toPrecision(3)));
  document.getElementById("high").textContent = shown(Number(high.toPrecision(3)));
  document.getElementById("unit").textContent = `${radio.dataset.name} (${radio.dataset.unit})`;
  const stops = [0, 0.25, 0.5, 0.75, 1].map((at) => tint(low + at * (high - low), middle, reach || 1));
  document.getElementById("bar").style.background = `linear-gradient(to right, ${stops.join(", ")})`;
}

function tell(token) {
  for (const other of all(".current")) other.classList.remove("current");
  token.classList.add("current");
  const tokens = all("[data-n]", token.parentElement), numbers = numbersOf(token);
  const figuresTold = figures.map((radio, i) => `${radio.dataset.name} ${shown(numbers[i])}`).join(" · ");
  document.getElementById("told").textContent =
    `${tokens.indexOf(token) + 1} of ${tokens.length} ${JSON.stringify(token.textContent)}: ${figuresTold}`;
}

function showEpisode() {
  for (const article of all(".episode")) article.hidden = article.dataset.episode !== select.value;
  for (const other of all(".current")) other.classList.remove("current");
  document.getElementById("told").textContent = "No token is chosen.";
  paint();
}

if (select) {
  select.addEventListener("change", showEpisode);
  for (const radio of figures) radio.addEventListener("change", paint);
  for (const text of all(".tokens")) {
    text.addEventListener("mouseover", (event) => { if (event.target.dataset.n !== undefined) tell(event.target); });
    text.addEventListener("click", (event) => { if (event.target.dataset.n !== undefined) tell(event.target); });
    text.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      if (!step) return;
      const tokens = all("[data-n]", text), at = tokens.findIndex((token) => token.classList.contains("current"));
      const next = at < 0 ? 0 : Math.max(0, Math.min(tokens.length - 1, at + step));
      tell(tokens[next]);
      event.preventDefault();
    });
  }
  showEpisode();
}
if (sides.length) showTexts();
