// Checks of the page that is open, each of which returns a list of problems as text.
(() => {
  const shown = element => element.checkVisibility({visibilityProperty: true, opacityProperty: true});
  const name = element => {
    const text = (element.textContent || element.getAttribute("alt") || "").trim().replace(/\s+/g, " ");
    const classes = element.getAttribute("class");
    return `<${element.localName}${element.id ? "#" + element.id : ""}${classes ? "." + classes.replace(/ /g, ".") : ""}> ${text.slice(0, 60)}`;
  };
  const scrolls = element => ["auto", "scroll"].includes(getComputedStyle(element).overflowX);
  const ancestors = element => {
    const list = [];
    for (let e = element; e instanceof Element; e = e.parentElement) list.push(e);
    return list;
  };
  const texts = () => {
    const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT), nodes = [];
    while (walker.nextNode()) {
      const node = walker.currentNode, parent = node.parentElement;
      if (node.data.trim() && !parent.closest("script, style, title, noscript, option, desc") && shown(parent)) nodes.push(node);
    }
    return nodes;
  };
  const boxOf = node => {
    const range = document.createRange();
    range.selectNodeContents(node);
    return range.getBoundingClientRect();
  };

  function overflow() {
    const problems = [], width = document.documentElement.clientWidth;
    if (document.documentElement.scrollWidth > width)
      problems.push(`the page is ${document.documentElement.scrollWidth} wide in a window of ${width}`);
    for (const node of texts()) {
      const box = boxOf(node), parents = ancestors(node.parentElement);
      if (box.width < 2 || box.height < 2) continue;  // text for screen readers
      if (parents.some(scrolls)) continue;
      const svg = node.parentElement.closest("svg");
      const frame = svg ? svg.getBoundingClientRect() : {left: 0, right: width, top: -Infinity, bottom: Infinity};
      if (box.left < frame.left - 1 || box.right > frame.right + 1 || box.top < frame.top - 1 || box.bottom > frame.bottom + 1)
        problems.push(`outside of its frame: ${name(node.parentElement)}`);
    }
    for (const element of document.querySelectorAll("body *")) {
      if (element instanceof SVGElement || !shown(element)) continue;
      const style = getComputedStyle(element), box = element.getBoundingClientRect();
      if (box.width < 2 || box.height < 2) continue;
      const hides = value => value === "hidden" || value === "clip";
      if (hides(style.overflowX) && element.scrollWidth > element.clientWidth + 1 && element.textContent.trim())
        problems.push(`cut off at the side: ${name(element)}`);
      if (hides(style.overflowY) && element.scrollHeight > element.clientHeight + 1 && element.textContent.trim())
        problems.push(`cut off below: ${name(element)}`);
    }
    return problems;
  }

  function pictures() {
    const problems = [];
    for (const element of document.querySelectorAll("img, svg, canvas")) {
      if (!element.checkVisibility()) continue;
      const box = element.getBoundingClientRect();
      if (Math.min(box.width, box.height) <= 0 || element.naturalWidth === 0) problems.push(`without a size: ${name(element)}`);
      if (element.localName === "img" && !element.hasAttribute("alt")) problems.push(`without alt: ${name(element)}`);
    }
    return problems;
  }

  const canvas = document.createElement("canvas");
  canvas.width = canvas.height = 1;
  const brush = canvas.getContext("2d", {willReadFrequently: true}), known = new Map();
  const rgba = color => {
    if (!known.has(color)) {
      brush.clearRect(0, 0, 1, 1);
      brush.fillStyle = color;
      brush.fillRect(0, 0, 1, 1);
      const [r, g, b, a] = brush.getImageData(0, 0, 1, 1).data;
      known.set(color, [r, g, b, a / 255]);
    }
    return known.get(color);
  };
  const blend = (front, back) => [0, 1, 2].map(i => front[i] * front[3] + back[i] * (1 - front[3])).concat(1);
  const background = element => {
    const layers = ancestors(element).map(e => rgba(getComputedStyle(e).backgroundColor));
    const opaque = layers.findIndex(layer => layer[3] === 1);
    const canvasColor = matchMedia("(prefers-color-scheme: dark)").matches ? [18, 18, 18, 1] : [255, 255, 255, 1];
    const base = opaque < 0 ? canvasColor : layers[opaque];
    return layers.slice(0, opaque < 0 ? layers.length : opaque).reduceRight((back, layer) => blend(layer, back), base);
  };
  const luminance = color => {
    const [r, g, b] = color.slice(0, 3).map(v => (v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };

  // WCAG 2.2, success criterion 1.4.3 (AA).
  function contrast() {
    const problems = new Set();
    for (const node of texts()) {
      const element = node.parentElement, style = getComputedStyle(element);
      const box = boxOf(node);
      if (box.width < 2 || box.height < 2 || element.closest(":disabled, [aria-disabled=true]")) continue;
      const back = background(element), own = rgba(element instanceof SVGElement ? style.fill : style.color);
      const opacity = ancestors(element).reduce((product, e) => product * getComputedStyle(e).opacity, 1);
      const front = blend([...own.slice(0, 3), own[3] * opacity], back);
      const [dark, light] = [luminance(front), luminance(back)].sort((a, b) => a - b);
      const ratio = (light + 0.05) / (dark + 0.05), size = parseFloat(style.fontSize);
      const isLarge = size >= 24 || (size >= 18.66 && style.fontWeight >= 700);
      if (ratio < (isLarge ? 3 : 4.5)) problems.add(`contrast ${ratio.toFixed(2)}: ${name(element)}`);
    }
    return [...problems];
  }

  function headings() {
    const levels = [...document.querySelectorAll("h1, h2, h3, h4, h5, h6")].filter(shown).map(e => [Number(e.localName[1]), name(e)]);
    const problems = levels.filter(([level]) => level === 1).length === 1 ? [] : ["the page needs one h1"];
    levels.forEach(([level, text], i) => {
      if (level > (i ? levels[i - 1][0] : 0) + 1) problems.push(`a level is skipped before ${text}`);
    });
    return problems;
  }

  function controls() {
    const problems = [];
    for (const element of document.querySelectorAll("a, button, input, select, textarea, summary"))
      if (shown(element)) {
        const label = element.getAttribute("aria-label") || element.textContent.trim() || element.title || element.labels?.length;
        if (!label) problems.push(`without a name: ${element.outerHTML.slice(0, 80)}`);
      }
    for (const id of document.querySelectorAll("[id]"))
      if (document.querySelectorAll(`#${CSS.escape(id.id)}`).length > 1 && !(id instanceof SVGElement)) problems.push(`id twice: ${id.id}`);
    return problems;
  }

  window.pageChecks = {overflow, pictures, contrast, headings, controls, shown, name};
})();
