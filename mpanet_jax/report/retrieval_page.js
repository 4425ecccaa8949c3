"use strict";
// Everything that comes from files reaches the page as text: by textContent, setAttribute and properties, never as HTML.
const data = JSON.parse(document.getElementById("data").textContent);
const { images, queries, identities } = data;
const PER_PAGE = 20;
const NOBODY = -1;
const element = (id) => document.getElementById(id);
let shown = []; // the queries that the filters leave, in order
let page = 0;
let current = 0; // the card on this page that Tab comes to

function make(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

// ---- what is known of an image and a query ----

const identityOf = (image) => (images.identity[image] < 0 ? "unknown" : identities[images.identity[image]]);
const cameraOf = (image) => (images.camera[image] < 0 ? "" : `camera ${images.camera[image]}`);
const modalityOf = (image) => data.modalities[images.modality[image]] || "";
const about = (image) => [cameraOf(image), modalityOf(image)].filter(Boolean).join(" · ");
const addressOf = (image, kind) =>
  data.folder === null
    ? (kind === "photo" ? images.photo : images.maps)[image]
    : `${encodeURIComponent(data.folder)}/${String(image).padStart(6, "0")}${kind === "photo" ? ".jpg" : "_maps.png"}`;
const isRight = (query, image) =>
  images.identity[queries.image[query]] >= 0 && images.person[image] === images.person[queries.image[query]];
const isScored = (query) => data.scored && queries.matches[query] > 0;
const percent = (value) => `${(100 * value).toFixed(1)} %`;

// ---- filter and sort ----

const SORTS = {
  failures: (a, b) => (queries.rank[a] === 1) - (queries.rank[b] === 1) || queries.ap[a] - queries.ap[b],
  ap: (a, b) => queries.ap[a] - queries.ap[b],
  "-ap": (a, b) => queries.ap[b] - queries.ap[a],
  "-rank": (a, b) => queries.rank[b] - queries.rank[a],
  listed: () => 0,
};

function choose() {
  const camera = element("camera").value;
  const identity = element("identity").value.trim();
  const rank = element("rank").value;
  const known = identities.includes(identity);
  const passes = (query) => {
    const image = queries.image[query];
    if (camera !== "" && String(images.camera[image]) !== camera) return false;
    if (identity && (known ? identityOf(image) !== identity : !identityOf(image).includes(identity))) return false;
    if (rank === "all") return true;
    if (rank === "none") return !isScored(query);
    if (!isScored(query)) return false;
    return rank === "1" ? queries.rank[query] === 1 : queries.rank[query] > Number(rank.slice(1));
  };
  shown = queries.image.map((_, query) => query).filter(passes);
  const order = data.scored ? SORTS[element("sort").value] : SORTS.listed;
  // Queries without a match have no figures: they come last. Equal ones stay as listed.
  shown.sort((a, b) => isScored(b) - isScored(a) || order(a, b) || a - b);
  page = 0;
  draw();
}

// ---- drawing ----

function picture(image) {
  const box = make("div", { class: "picture" });
  if (images.missing[image]) {
    box.append(make("span", { class: "absent" }, "no image"));
    return box;
  }
  const photo = make("img", { class: "photo", loading: "lazy", decoding: "async", alt: "" });
  photo.addEventListener("error", () => photo.replaceWith(make("span", { class: "absent" }, "no image")));
  photo.src = addressOf(image, "photo");
  box.append(photo);
  return box;
}

function patternMaps(image) {
  const strip = make("div", { class: "maps", role: "img", "aria-label": `its ${data.patterns} pattern maps` });
  for (let k = 0; k < data.patterns; k++) {
    const photo = make("img", { class: "photo", alt: "", loading: "lazy" });
    const map = make("img", { class: "map", alt: "", loading: "lazy" });
    photo.src = addressOf(image, "photo");
    map.src = addressOf(image, "maps");
    map.style.width = `${100 * data.patterns}%`; // all maps lie side by side in one file
    map.style.left = `${-100 * k}%`;
    strip.append(make("span", {}, photo, map));
  }
  return strip;
}

function tile(query, image, rank, distance) {
  const right = isRight(query, image);
  const known = images.identity[image] >= 0 && images.identity[queries.image[query]] >= 0;
  const caption = make("figcaption");
  if (known) caption.append(make("span", { class: "mark" }, right ? "✓" : "✗"), " ");
  caption.append(`${rank}. ${identityOf(image)}`);
  const where = cameraOf(image).replace("camera", "cam");
  const figure = make("figure", {}, picture(image), caption, make("p", { class: "under" }, [distance, where].filter((text) => text !== "").join(" · ")));
  if (wantsMaps(query) && !images.missing[image]) figure.append(patternMaps(image));
  const words = known ? (right ? "right" : "wrong") : "not known";
  return make(
    "li",
    {
      class: known ? (right ? "right" : "wrong") : "",
      title: `${images.path[image]}\n${about(image)}`,
      "aria-label": `rank ${rank}, ${words}, identity ${identityOf(image)}, distance ${distance}`,
    },
    figure,
  );
}

// The first right image, where it is none of those that are shown in any case.
function laterFirst(query) {
  const first = data.scored ? queries.first[query] : NOBODY;
  return queries.top[query].includes(first) ? NOBODY : first;
}

function resultOf(query) {
  if (!data.scored) return "";
  if (!isScored(query)) return "no match in the gallery: not scored";
  const position = queries.position[query];
  const rank = queries.rank[query];
  const identity = rank !== position ? ` (identity ${rank})` : "";
  return `first right image at rank ${position}${identity} · AP ${percent(queries.ap[query])} · ${queries.matches[query]} right in all`;
}

const opened = new Set(); // queries whose details are shown
const wantsMaps = (query) => data.patterns > 0 && (element("maps").checked || opened.has(query));

function details(query) {
  const rows = [["", "path", "identity", "camera", "modality", data.distance]];
  const add = (what, image, distance) =>
    rows.push([what, images.path[image], identityOf(image), cameraOf(image).slice(7), modalityOf(image), distance]);
  add("query", queries.image[query], "");
  queries.top[query].forEach((image, place) => {
    if (image !== NOBODY) add(`${place + 1}${isRight(query, image) ? " ✓" : ""}`, image, queries.distances[query][place]);
  });
  const first = laterFirst(query);
  if (first !== NOBODY) add(`${queries.position[query]} ✓`, first, queries.first_distance[query]);
  const table = make("table");
  rows.forEach((row, index) => table.append(make("tr", {}, ...row.map((text) => make(index ? "td" : "th", {}, String(text))))));
  return make("div", { class: "details" }, table);
}

function card(query, place) {
  const image = queries.image[query];
  const failed = isScored(query) && queries.rank[query] !== 1;
  const heading = make("h2", {}, `Query ${query + 1}: identity ${identityOf(image)}`);
  const result = make("span", { class: failed ? "result wrong" : "result" }, (failed ? "✗ " : "") + resultOf(query));
  const toggle = make("button", { type: "button", tabindex: "-1", "aria-expanded": String(opened.has(query)) }, "Details");
  toggle.addEventListener("click", () => toggleDetails(place));
  const caption = make("figcaption", {}, make("b", {}, "query"), make("br"), about(image));
  const asked = make("figure", { class: "query", title: images.path[image] }, picture(image), caption);
  if (wantsMaps(query) && !images.missing[image]) asked.append(patternMaps(image));
  const ranked = make("ol", { class: "ranked" });
  queries.top[query].forEach((other, rank) => {
    if (other !== NOBODY) ranked.append(tile(query, other, rank + 1, queries.distances[query][rank]));
  });
  const first = laterFirst(query);
  if (first !== NOBODY) {
    const later = tile(query, first, queries.position[query], queries.first_distance[query]);
    later.classList.add("later");
    ranked.append(later);
  }
  const made = make(
    "article",
    {
      tabindex: place === current ? "0" : "-1",
      "data-query": query,
      "aria-label": [`Query ${query + 1}, identity ${identityOf(image)}`, about(image), resultOf(query)].join(", "),
    },
    make("div", { class: "head" }, heading, result, toggle),
    make("div", { class: "row" }, asked, ranked),
  );
  if (opened.has(query)) made.append(details(query));
  return made;
}

function draw() {
  const pages = Math.max(1, Math.ceil(shown.length / PER_PAGE));
  page = Math.min(Math.max(page, 0), pages - 1);
  const part = shown.slice(page * PER_PAGE, (page + 1) * PER_PAGE);
  current = 0;
  element("queries").replaceChildren(...part.map(card));
  const count = shown.length.toLocaleString("en");
  const from = shown.length ? page * PER_PAGE + 1 : 0;
  element("status").textContent =
    `${from}–${page * PER_PAGE + part.length} of ${count} ${shown.length === 1 ? "query" : "queries"}, page ${page + 1} of ${pages}`;
  element("previous").disabled = page === 0;
  element("next").disabled = page === pages - 1;
}

function toggleDetails(place) {
  const query = shown[page * PER_PAGE + place];
  opened.has(query) ? opened.delete(query) : opened.add(query);
  element("queries").children[place].replaceWith(card(query, place));
  focusCard(place);
}

function focusCard(place) {
  const cards = element("queries").children;
  if (cards.length) cards[Math.min(Math.max(place, 0), cards.length - 1)].focus();
}

// However a card got the focus, by a key or a click: it is the one that keys act on.
function makeCurrent(focused) {
  const cards = [...element("queries").children];
  const place = cards.indexOf(focused);
  if (place < 0) return;
  cards[current]?.setAttribute("tabindex", "-1");
  current = place;
  focused.setAttribute("tabindex", "0");
}

function turn(by) {
  const last = Math.max(0, Math.ceil(shown.length / PER_PAGE) - 1);
  if (page + by < 0 || page + by > last) return; // nothing is drawn again: the focus stays
  page += by;
  draw();
  focusCard(0);
  scrollTo(0, element("tools").offsetTop);
}

// ---- events ----

for (const id of ["camera", "rank", "sort"]) element(id).addEventListener("change", choose);
element("identity").addEventListener("input", choose);
element("maps").addEventListener("change", draw);
element("tools").addEventListener("submit", (event) => event.preventDefault());
element("tools").addEventListener("reset", () => setTimeout(choose));
element("previous").addEventListener("click", () => turn(-1));
element("next").addEventListener("click", () => turn(1));
element("queries").addEventListener("focusin", (event) => makeCurrent(event.target.closest("article")));
document.addEventListener("keydown", (event) => {
  if (event.altKey || event.ctrlKey || event.metaKey) return;
  const inTools = event.target.closest("form, nav, button");
  const onCard = event.target.closest("article");
  if (inTools && !onCard) return; // selects and fields have arrows of their own
  if (event.key === "ArrowDown") focusCard(onCard ? current + 1 : current);
  else if (event.key === "ArrowUp") focusCard(onCard ? current - 1 : current);
  else if (event.key === "ArrowRight") turn(1);
  else if (event.key === "ArrowLeft") turn(-1);
  else if (event.key === "Home" && onCard) focusCard(0);
  else if (event.key === "End" && onCard) focusCard(PER_PAGE);
  else if (event.key === "Enter" && onCard && event.target === onCard) toggleDetails(current);
  else return;
  event.preventDefault();
});

const cameras = [...new Set(queries.image.map((image) => images.camera[image]))].filter((camera) => camera >= 0);
for (const camera of cameras.sort((a, b) => a - b)) {
  element("camera").append(make("option", { value: String(camera) }, String(camera)));
}
const asked = [...new Set(queries.image.map((image) => images.identity[image]))].filter((identity) => identity >= 0);
for (const identity of asked) element("identities").append(make("option", { value: identities[identity] }));
element("maps-label").hidden = data.patterns === 0;
if (!data.scored) {
  element("rank-label").hidden = true;
  element("sort").closest("label").hidden = true;
}
choose();
