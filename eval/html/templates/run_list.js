// Filters, order and selection belong to the reader: they are in the page's address or its session,
// and no update changes them.
const body = document.querySelector(".runs tbody"), heads = [...document.querySelectorAll(".runs th")];
const controls = ["filter", "state", "method"].map(id => document.getElementById(id));
const compareButton = document.getElementById("compare"), options = new URLSearchParams(location.search);
// Rows on the screen, and the versions of them that the server sent, by the run's name. A row that has
// not changed since the page was opened has no such version yet.
const rows = new Map([...body.rows].map(row => [row.dataset.key, row])), sources = new Map();
let newest = version;

body.parentElement.hidden = false;  // the table is complete

// Return the version of a row that the server sent: what is shown, without the reader's changes.
function sourceOf(row) {
  const source = row.cloneNode(true);
  source.hidden = source.querySelector("details").open = false;
  link(source, row);
  return source;
}

function filterRows() {
  const words = controls[0].value.toLowerCase().split(/\s+/).filter(Boolean), [, state, method] = controls.map(item => item.value);
  let count = 0;
  for (const row of body.rows) {
    const text = row.dataset.text.toLowerCase();
    row.hidden = !(words.every(word => text.includes(word)) && (!state || row.dataset.state === state) && (!method || row.dataset.method === method));
    count += !row.hidden;
  }
  const total = body.rows.length;
  document.getElementById("shown").textContent = count < total ? `; ${count} shown` : "";
  document.getElementById("none").hidden = count > 0;
}

function sortKey(row, column) {
  const text = row.cells[column].dataset.sort;
  return text === "" || isNaN(text) ? text.toLowerCase() : Number(text);
}

// Cells without a value come last in both directions.
function compareRows(a, b) {
  const column = heads.findIndex(head => head.ariaSort);
  if (column < 0) return 0;
  const offset = body.rows[0].cells.length - heads.length, sign = heads[column].ariaSort === "ascending" ? 1 : -1;
  const [x, y] = [a, b].map(row => sortKey(row, column + offset));
  if (x === "" || y === "") return (x === "") - (y === "");
  if (typeof x === "number" && typeof y === "number") return sign * (x - y);
  return sign * String(x).localeCompare(String(y), undefined, {numeric: true});
}

// Rows move only if they must, and not while the reader has selected a text in the table.
function sortRows() {
  if (!heads.some(head => head.ariaSort)) return;
  const selection = getSelection();
  if (!selection.isCollapsed && body.contains(selection.anchorNode)) return;
  const focused = document.activeElement, present = [...body.rows], sorted = present.toSorted(compareRows);
  let at = body.firstElementChild;
  for (const row of sorted) {
    if (row === at) at = at.nextElementSibling;
    else body.insertBefore(row, at);
  }
  if (focused !== document.activeElement && focused.isConnected) focused.focus({preventScroll: true});
}

function remember() {
  controls.forEach(item => item.value ? options.set(item.id, item.value) : options.delete(item.id));
  const head = heads.findIndex(item => item.ariaSort);
  if (head >= 0) options.set("sort", `${head} ${heads[head].ariaSort}`);
  history.replaceState(null, "", options.size ? `?${options}` : location.pathname);
}

function selected() {
  return [...body.querySelectorAll(".pick input:checked")].map(box => box.value);
}

function showSelection() {
  if (!compareButton) return;
  const names = selected();
  compareButton.disabled = names.length < 2;
  compareButton.textContent = names.length < 2 ? "Compare selected runs" : `Compare ${names.length} runs`;
  sessionStorage.setItem("selected", JSON.stringify(names));
}

for (const head of heads) {
  head.firstElementChild.addEventListener("click", () => {
    const next = head.ariaSort === "descending" ? "ascending" : "descending";
    const first = head.classList.contains("word") ? "ascending" : "descending";
    const order = head.ariaSort ? next : first;
    heads.forEach(item => item.ariaSort = null);
    head.ariaSort = order;
    getSelection().removeAllRanges();
    sortRows();
    remember();
  });
}
for (const item of controls) {
  if (options.has(item.id)) item.value = options.get(item.id);
  item.addEventListener("input", () => {
    filterRows();
    remember();
  });
}
if (options.has("sort")) {
  const [head, order] = options.get("sort").split(" ");
  if (heads[head]) heads[head].ariaSort = order;
}
if (compareButton) {
  const names = new Set(JSON.parse(sessionStorage.getItem("selected") ?? "[]"));
  for (const box of body.querySelectorAll(".pick input")) box.checked = names.has(box.value);
  body.addEventListener("change", showSelection);
  compareButton.addEventListener("click", () => {
    location.href = `/compare?${selected().map(name => `run=${encodeURIComponent(name)}`).join("&")}`;
  });
  showSelection();
}

async function refresh() {
  const answer = await fetch(`/changes?since=${newest}`);
  if (!answer.ok) throw new Error(parse(await answer.text()).textContent.trim());
  const changes = await answer.json();
  if (changes.evaluations.join() !== evaluations.join()) return location.reload();  // other columns
  document.getElementById("counts").textContent = changes.counts;
  for (const [name, html] of Object.entries(changes.rows)) {
    const fresh = parse(`<table><tbody>${html}</tbody></table>`).querySelector("tr");
    const row = rows.get(name);
    if (row) update(sources.get(name) ?? sourceOf(row), fresh);
    else rows.set(name, body.appendChild(take(fresh)));
    sources.set(name, fresh);
  }
  if (changes.names) {
    const names = new Set(changes.names);
    for (const [name, row] of rows) {
      if (names.has(name)) continue;
      row.remove();
      rows.delete(name);
      sources.delete(name);
    }
    addMethods();
  }
  if (newest !== changes.version) {
    newest = changes.version;
    sortRows();
    filterRows();
    showSelection();
    showTimes();
  }
}

function addMethods() {
  const known = new Set([...controls[2].options].map(option => option.value));
  for (const row of body.rows) {
    const method = row.dataset.method;
    if (method && !known.has(method)) controls[2].add(new Option(method));
    known.add(method);
  }
}

sortRows();
filterRows();
showTimes();
if (refreshSeconds) poll(refresh, () => refreshSeconds);
