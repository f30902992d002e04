"use strict";
// Every value that appears under the pointer also appears for the keyboard: focus an element, and
// move with the arrow keys. All listeners are on the document, so that a live page may replace its content.
document.documentElement.classList.add("js");
const tip = document.body.appendChild(document.createElement("div"));
tip.id = "tip";
tip.setAttribute("role", "tooltip");
tip.setAttribute("aria-live", "polite");
tip.hidden = true;

let anchor = null;  // returns the point of the window that the tip belongs to

function placeTip() {
  if (tip.hidden) return;
  const [x, y] = anchor(), gap = 14, box = tip.getBoundingClientRect(), width = document.documentElement.clientWidth;
  const left = x + gap + box.width > width ? x - gap - box.width : x + gap;
  const top = y + gap + box.height > innerHeight ? y - gap - box.height : y + gap;
  tip.style.left = `${Math.max(4, Math.min(left, width - box.width - 4))}px`;
  tip.style.top = `${Math.max(4, top)}px`;
}

function showTip(content, findAnchor) {
  tip.replaceChildren(...content);
  tip.hidden = false;
  anchor = findAnchor;
  placeTip();
}

function hideTip() {
  tip.hidden = true;
  document.querySelectorAll(".current").forEach(item => item.classList.remove("current"));
}

// The browser's own tooltip would cover this one, so the title moves to a data attribute.
function takeTitle(item) {
  if (item.title) {
    item.dataset.tip = item.title;
    item.removeAttribute("title");
  }
  return item.dataset.tip;
}

function showItem(item) {
  const text = takeTitle(item), content = [];
  hideTip();
  item.classList.add("current");
  if (item.matches(".map i")) {
    const picture = document.createElement("i");
    picture.className = "preview";
    picture.style.setProperty("--i", item.style.getPropertyValue("--i"));
    content.push(picture);
  }
  content.push(document.createTextNode(text));
  showTip(content, () => {
    const box = item.getBoundingClientRect();
    return [box.right - 8, box.bottom - 8];
  });
}

const ARROWS = {ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1]};

// Return the nearest item in the direction of an arrow key. Distances across it count double.
function neighbor(items, current, [dx, dy]) {
  const center = item => {
    const box = item.getBoundingClientRect();
    return [box.x + box.width / 2, box.y + box.height / 2];
  };
  const [x, y] = center(current);
  let best = current, least = Infinity;
  for (const item of items) {
    const [a, b] = center(item), ahead = (a - x) * dx + (b - y) * dy;
    const aside = Math.abs((a - x) * dy + (b - y) * dx), distance = ahead + 2 * aside;
    if (ahead > 1 && distance < least) [best, least] = [item, distance];
  }
  return best;
}

document.addEventListener("pointerover", event => {
  const item = event.target.closest?.("[title], [data-tip]");
  if (item) showItem(item);
});
document.addEventListener("pointerout", event => {
  if (event.target.closest?.("[data-tip]")) hideTip();
});
document.addEventListener("focusout", hideTip);
document.addEventListener("scroll", placeTip, {passive: true, capture: true});  // focus scrolls, too
document.addEventListener("focusin", event => {
  if (!event.target.matches("[data-roving]:focus-visible")) return;
  const first = event.target.querySelector("[title], [data-tip]");
  if (first) showItem(first);
});
document.addEventListener("keydown", event => {
  if (event.key === "Escape") hideTip();
  if (!event.target.matches("[data-roving]") || !(event.key in ARROWS)) return;
  const items = [...event.target.querySelectorAll("[title], [data-tip]")];
  if (!items.length) return;
  const current = event.target.querySelector(".current");
  const item = current ? neighbor(items, current, ARROWS[event.key]) : items[0];
  event.preventDefault();
  item.scrollIntoView({block: "nearest", inline: "nearest"});
  showItem(item);
});
