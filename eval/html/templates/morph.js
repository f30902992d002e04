"use strict";
// Change a tree of the page from one version that the server sent to the next. Nodes that did not
// change stay as they are, with their selection, focus, scroll position and open folds. Nodes that
// other scripts added are not touched.
const shownNodes = new WeakMap();  // node of a version of the server -> node on the screen

function link(source, shown) {
  shownNodes.set(source, shown);
  source.childNodes.forEach((child, i) => link(child, shown.childNodes[i]));
}

function parse(html) {
  const template = document.createElement("template");
  template.innerHTML = html;
  return template.content;
}

function take(source) {
  const node = document.importNode(source, true);
  link(source, node);
  return node;
}

// Spaces between elements are left alone: they are not drawn, and all look the same.
const parts = node => [...node.childNodes].filter(child => child.nodeType === 1 || (child.nodeType === 3 && child.data.trim()));

function nameOf(node) {
  if (node.nodeType !== 1) return node.nodeName;
  const title = node.querySelector(":scope > h2, :scope > h3, :scope > dt, :scope > figcaption > b");
  return `${node.nodeName} ${node.id || node.dataset.key || node.dataset.file || title?.textContent || ""}`;
}

function relink(old, fresh) {
  shownNodes.set(fresh, shownNodes.get(old));
  fresh.childNodes.forEach((child, i) => relink(old.childNodes[i], child));
}

function replace(shown, fresh) {
  const hasFocus = shown === document.activeElement, isVisible = hasFocus && shown.matches(":focus-visible");
  const node = take(fresh);
  shown.replaceWith(node);
  if (hasFocus) node.focus({preventScroll: true, focusVisible: isVisible});
}

function update(old, fresh) {
  const shown = shownNodes.get(old);
  if (old.isEqualNode(fresh)) return relink(old, fresh);
  if (old.nodeName.toLowerCase() === "svg") return replace(shown, fresh);
  shownNodes.set(fresh, shown);
  if (old.nodeType === 3) {
    shown.data = fresh.data;
    return;
  }
  for (const {name} of [...old.attributes]) if (!fresh.hasAttribute(name)) shown.removeAttribute(name);
  for (const {name, value} of [...fresh.attributes]) if (old.getAttribute(name) !== value) shown.setAttribute(name, value);
  updateChildren(old, fresh, shown);
}

function updateChildren(old, fresh, shown) {
  const olds = parts(old);
  let next = 0;
  for (const child of parts(fresh)) {
    const found = olds.findIndex((candidate, i) => i >= next && nameOf(candidate) === nameOf(child));
    if (found < 0) {
      const after = next < olds.length ? shownNodes.get(olds[next]) : shownNodes.get(olds.at(-1))?.nextSibling ?? null;
      shown.insertBefore(take(child), after);
      continue;
    }
    olds.slice(next, found).forEach(gone => shownNodes.get(gone).remove());
    update(olds[found], child);
    next = found + 1;
  }
  olds.slice(next).forEach(gone => shownNodes.get(gone).remove());
}

// Texts of times: how long until one, and its time of day.
function showTimes() {
  for (const item of document.querySelectorAll("[data-ends]")) {
    const end = Number(item.dataset.ends), seconds = Math.max(0, Math.floor(end - Date.now() / 1000));
    const hours = Math.floor(seconds / 3600), pad = number => String(number).padStart(2, "0");
    const text = hours >= 100 ? `${Math.floor(hours / 24)}d ${pad(hours % 24)}h`
      : `${hours}:${pad(Math.floor(seconds / 60) % 60)}:${pad(seconds % 60)}`;
    if (item.textContent !== text) item.textContent = text;
  }
}
setInterval(showTimes, 1000);

// Call `refresh` again and again, less often if nothing moves, and at once when the tab is shown.
function poll(refresh, seconds) {
  let timer = 0, lastAnswer = new Date(), isBusy = false;
  const status = document.getElementById("connection");
  async function run() {
    clearTimeout(timer);
    if (isBusy) return;
    isBusy = true;
    try {
      await refresh();
      lastAnswer = new Date();
      if (!status.hidden) status.hidden = true;
    } catch (error) {
      const reason = error instanceof TypeError ? "The program that serves this page does not answer" : error.message;
      const text = `${reason}. What you see is of ${lastAnswer.toLocaleTimeString()}.`;
      if (status.hidden || !status.textContent) [status.textContent, status.hidden] = [text, false];
    }
    isBusy = false;
    timer = setTimeout(run, 1000 * seconds());
  }
  document.addEventListener("visibilitychange", () => document.hidden || run());
  timer = setTimeout(run, 1000 * seconds());
}
