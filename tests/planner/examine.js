// What is wrong with how the page looks, as a list of sentences; empty if nothing is.
(() => {
  const problems = [];
  const SLACK = 1.5; // pixels: glyphs may stick out of their line by a fraction
  const name = (element) => `<${element.tagName} class="${element.getAttribute("class") || ""}">`;
  for (const closed of document.querySelectorAll("details")) closed.open = true;
  const page = document.documentElement;
  if (page.scrollWidth > innerWidth) problems.push(`the page is ${page.scrollWidth} wide in a window of ${innerWidth}`);

  // Every piece of text with the box that it takes.
  const pieces = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const node = walker.currentNode, parent = node.parentElement;
    if (!node.data.trim() || ["STYLE", "TITLE", "style", "title"].includes(parent.tagName)) continue;
    const range = document.createRange();
    range.selectNodeContents(node);
    for (const box of range.getClientRects()) {
      if (box.width && box.height) pieces.push({ text: node.data.trim(), parent, box });
    }
  }
  if (!pieces.length) problems.push("the page has no text");

  const inside = (box, frame, sides) =>
    (!sides.includes("x") || (box.left >= frame.left - SLACK && box.right <= frame.right + SLACK)) &&
    (!sides.includes("y") || (box.top >= frame.top - SLACK && box.bottom <= frame.bottom + SLACK));
  const scrolls = (element, axis) => ["auto", "scroll"].includes(getComputedStyle(element)[`overflow-${axis}`]);
  for (const { text, parent, box } of pieces) {
    const drawing = parent.closest("svg");
    if (drawing && !inside(box, drawing.getBoundingClientRect(), "xy")) {
      problems.push(`${JSON.stringify(text)} sticks out of its drawing`);
    }
    let free = "xy"; // sides on which nothing above lets it scroll into view
    for (let above = parent; above && above !== document.body; above = above.parentElement) {
      const frame = above.getBoundingClientRect(), style = getComputedStyle(above);
      for (const axis of free) {
        if (scrolls(above, axis)) free = free.replace(axis, "");
        else if (style[`overflow-${axis}`] !== "visible" && !(above instanceof SVGElement) && !inside(box, frame, axis)) {
          problems.push(`${JSON.stringify(text)} is clipped by ${name(above)}`);
        }
      }
    }
    if (free.includes("x") && (box.left < -SLACK || box.right > innerWidth + SLACK)) {
      problems.push(`${JSON.stringify(text)} lies outside the window`);
    }
  }

  // Sorted from left to right, only neighbours can overlap.
  const sorted = [...pieces].sort((a, b) => a.box.left - b.box.left);
  for (let i = 0; i < sorted.length; i++) {
    const a = sorted[i].box;
    for (let j = i + 1; j < sorted.length && sorted[j].box.left < a.right - SLACK; j++) {
      const b = sorted[j].box;
      // Lines of text may share the space between them, and letters of two sizes their lines; not more than a quarter.
      const shared = Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top);
      if (Math.min(a.right, b.right) - b.left > SLACK && shared > Math.min(a.height, b.height) / 4) {
        problems.push(`${JSON.stringify(sorted[i].text)} and ${JSON.stringify(sorted[j].text)} overlap`);
      }
    }
  }

  // Contrast, as WCAG 2 defines it.
  const channels = (colour) => (colour.match(/[\d.]+/g) || []).map(Number);
  const luminance = (colour) => {
    const [r, g, b] = channels(colour).map((c) => (c / 255 <= 0.04045 ? c / 255 / 12.92 : ((c / 255 + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const contrast = (one, other) => {
    const [low, high] = [luminance(one), luminance(other)].sort((a, b) => a - b);
    return (high + 0.05) / (low + 0.05);
  };
  const background = (element) => {
    for (let above = element; above; above = above.parentElement) {
      const colour = getComputedStyle(above).backgroundColor, parts = channels(colour);
      if (!(above instanceof SVGElement) && (parts.length === 3 || parts[3] > 0)) return colour;
    }
    return "rgb(255, 255, 255)";
  };
  const beneath = (text, box) => {
    // In a drawing: the last shape before the text that lies under its middle.
    const x = (box.left + box.right) / 2, y = (box.top + box.bottom) / 2;
    for (let before = text.previousElementSibling; before; before = before.previousElementSibling) {
      const shape = before.getBoundingClientRect();
      if (before.tagName === "rect" && x > shape.left && x < shape.right && y > shape.top && y < shape.bottom) {
        const style = getComputedStyle(before);
        if (style.fill !== "none" && Number(style.fillOpacity) === 1) return style.fill;
      }
    }
    return background(text);
  };
  const seen = new Set();
  for (const { text, parent, box } of pieces) {
    const drawn = parent instanceof SVGElement;
    const ink = drawn ? getComputedStyle(parent).fill : getComputedStyle(parent).color;
    const under = drawn ? beneath(parent, box) : background(parent);
    const ratio = contrast(ink, under);
    if (ratio < 4.5 && !seen.has(ink + under)) {
      seen.add(ink + under);
      problems.push(`${JSON.stringify(text)}: contrast of ${ink} on ${under} is ${ratio.toFixed(2)}`);
    }
  }
  for (const segment of document.querySelectorAll(".stack span, .key, svg .device")) {
    const style = getComputedStyle(segment), colour = segment instanceof SVGElement ? style.fill : style.backgroundColor;
    const ratio = contrast(colour, background(segment.closest("div")));
    if (ratio < 3 && !seen.has(colour)) {
      seen.add(colour);
      problems.push(`${name(segment)}: contrast of ${colour} to its surroundings is ${ratio.toFixed(2)}`);
    }
  }

  for (const picture of document.querySelectorAll("svg, [role=img]")) {
    if (!(picture.getAttribute("aria-label") || "").trim()) problems.push(`${name(picture)} has no text alternative`);
  }
  return problems;
})();
