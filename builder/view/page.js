// What changes under the reader's hand: colours, the panel, the search, and links to a token. Texts and pictures are there before this runs.
// A token is known by its row and its place in it; what was expected in its place stands in the dataset at the position before.
"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const $ = (id) => document.getElementById(id);

  // Numbers, in the types in which the dataset stores them.
  const types = { u1: Uint8Array, u2: Uint16Array, u4: Uint32Array, f4: Float32Array };
  const half = (bits) => {
    const sign = bits & 0x8000 ? -1 : 1, exponent = (bits >> 10) & 31, fraction = bits & 1023;
    if (exponent === 31) return fraction ? NaN : sign * Infinity;
    return sign * (exponent ? 2 ** (exponent - 15) * (1 + fraction / 1024) : 2 ** -14 * (fraction / 1024));
  };
  const values = {};
  let none = 0; // the number that stands for no token
  for (const [name, [type, text]] of Object.entries(data.arrays)) {
    const buffer = Uint8Array.from(atob(text), (character) => character.charCodeAt(0)).buffer;
    values[name] = type === "f2" ? Float32Array.from(new Uint16Array(buffer), half) : new types[type](buffer);
    if (name === "ids") none = type === "u2" ? 0xffff : 0xffffffff;
  }
  const positions = values.target.length;
  const width = values.ids.length / positions, draws = values.draws.length / positions;
  const firsts = data.other ? values.otherIds.length / positions : 0;

  // Rows and their tokens, the last of which is what follows the row.
  const rows = new Map();
  let start = 0;
  for (const { number, length } of data.rows) {
    const element = document.getElementById(`row=${number}`);
    rows.set(number, { number, length, start, element, tokens: [...element.querySelectorAll("i")] });
    start += length;
  }
  const order = [...rows.values()];
  const place = new Map();
  for (const row of order) row.tokens.forEach((token, index) => place.set(token, [row, index]));

  // Colours.
  const measured = {
    surprise: (p) => -values.targetLogprob[p],
    entropy: (p) => values.entropy[p],
    rank: (p) => (values.kept[p] && values.target[p] !== none ? values.rank[p] || Infinity : NaN),
    tail: (p) => Math.exp(values.tail[p]),
    divergence: (p) => values.divergence[p],
  };
  const format = {
    nats: (v) => v.toFixed(v < 0.1 ? 3 : 2),
    share: (v) => percent(v),
    rank: (v) => (v === Infinity ? "outside" : String(v)),
  };
  const percent = (v) => (v >= 0.9995 || v === 0 ? `${Math.round(v * 100)}%` : v >= 0.1 ? `${(v * 100).toFixed(1)}%` : v >= 0.0001 ? `${(v * 100).toFixed(2)}%` : "< 0.01%");
  let measure = $("measure").value;
  const level = (value, bounds) => (Number.isNaN(value) ? "" : String(bounds.reduce((n, bound) => n + (value > bound), 0)));
  function paint() {
    measure = $("measure").value;
    const { bounds, unit } = data.measures[measure];
    for (const row of order) {
      for (let i = 1; i <= row.length; i++) row.tokens[i].dataset.v = level(measured[measure](row.start + i - 1), bounds);
    }
    const name = (bound) => (unit === "share" ? `${+(bound * 100).toFixed(2)}%` : String(bound));
    $("legend").replaceChildren(...[...bounds, null].map((bound, i) => {
      const swatch = document.createElement("span"), above = name(bounds[bounds.length - 1]);
      swatch.textContent = bound === null ? (unit === "rank" ? `> ${above}, outside` : `> ${above}`) : (i ? "" : "≤ ") + name(bound);
      swatch.style.background = `var(--v${i})`;
      swatch.style.color = `var(--on${i})`;
      return swatch;
    }));
  }

  // Text, which is never markup; parts by turns as they are, and as signs for characters that cannot be seen.
  function spelled(number) {
    const holder = document.createElement("bdi");
    holder.dir = "ltr"; // a token is a sequence of characters, shown in their order
    if (number === none) return holder;
    const parts = data.strings[number];
    (typeof parts === "string" ? [parts] : parts).forEach((part, i) => holder.append(i % 2 ? make("u", part) : part));
    return holder;
  }
  function make(tag, ...content) {
    const element = document.createElement(tag);
    element.append(...content);
    return element;
  }
  const textOf = (token) => [...token.childNodes].filter((node) => node.nodeType === 3).map((node) => node.data).join("");

  // The panel.
  function bar(share, theirs) {
    const cell = make("td"), ours = make("em");
    cell.className = "share";
    ours.style.width = `${100 * share}%`;
    cell.append(ours, make("span", percent(share)));
    if (theirs !== undefined) {
      const them = make("em");
      them.className = "them";
      them.style.width = `${100 * (theirs || 0)}%`;
      const text = make("span", Number.isNaN(theirs) ? "not listed" : percent(theirs));
      text.className = "them-text";
      cell.append(them, text);
    }
    return cell;
  }
  function line(rank, token, share, { came = false, whole = false, theirs } = {}) {
    const cell = make("td", token), row = make("tr", make("td", rank), cell, bar(share, theirs));
    cell.className = "token";
    if (came) {
      row.className = "came";
      cell.append(make("small", " ← came"));
    }
    if (whole) row.className = "whole";
    return row;
  }
  function show(row, index) {
    const p = row.start + index - 1;
    $("panel").hidden = false;
    $("place").href = `#row=${row.number}&token=${index}`;
    $("place").textContent = `row ${row.number}, token ${index}`;
    $("place").title = index ? `position ${index - 1} of the dataset; a link to this token` : "a link to this token";
    const before = row.tokens.slice(Math.max(0, index - 40), index).map(textOf).join("").replace(/\s+/g, " ").slice(-90);
    $("context").replaceChildren(index ? `…${before}` : "", make("b", index < row.length ? textOf(row.tokens[index]).replace(/\n/g, "↵") || "…" : "…"));
    const body = $("bars").tBodies[0];
    body.replaceChildren();
    $("other").replaceChildren();
    $("bars").hidden = !index || !values.kept[p];
    if (!index) {
      $("summary").textContent = "The first token of a row: the teacher was asked nothing before it.";
      return;
    }
    const target = values.target[p], rank = values.rank[p], chance = Math.exp(values.targetLogprob[p]);
    summarize(p, index === row.length, target, rank, chance);
    if (!values.kept[p]) return;
    for (let k = 0; k < width; k++) {
      const number = values.ids[p * width + k];
      const other = data.other ? Math.exp(values.otherLogprobs[p * width + k]) : undefined;
      body.append(line(String(k + 1), spelled(number), Math.exp(values.logprobs[p * width + k]), { came: rank === k + 1, theirs: other }));
    }
    if (target !== none && (!rank || rank > width)) {
      body.append(line(rank ? String(rank) : "–", spelled(target), chance, { came: true, theirs: data.other ? Math.exp(values.otherTarget[p]) : undefined }));
    }
    if (values.rest[p] > 0) body.append(line("", `ranks ${width + 1} to ${data.topK ?? 1000}`, values.rest[p], { whole: true }));
    const tail = Math.exp(values.tail[p]);
    if (tail > 0 || draws) {
      const cell = make("span", data.topK === null ? "all others" : `outside the top ${data.topK}`), drawn = new Set();
      for (let m = 0; m < draws; m++) if (values.draws[p * draws + m] !== none) drawn.add(values.draws[p * draws + m]);
      if (drawn.size) {
        cell.append(", such as ");
        [...drawn].forEach((number, i) => cell.append(i ? ", " : "", spelled(number)));
      }
      body.append(line("", cell, tail, { whole: true }));
    }
    if (data.other && !Number.isNaN(values.divergence[p])) compare(p);
  }
  function summarize(p, isEnd, target, rank, chance) {
    const entropy = values.entropy[p], sure = `Entropy ${entropy.toFixed(2)} nats, as of ${Math.exp(entropy).toFixed(1)} equal choices.`;
    const summary = $("summary");
    if (target === none) {
      summary.replaceChildren(Number.isNaN(chance) ? "It is not known what follows this row. " : `What follows this row is not in the dataset: ${percent(chance)}. `, sure);
      return;
    }
    const which = rank ? `, rank ${rank.toLocaleString("en")}` : values.kept[p] && data.topK !== null ? `, outside the top ${data.topK}` : "";
    summary.replaceChildren(make("b", spelled(target)), ` ${isEnd ? "follows this row" : "came"}: ${percent(chance)}${which}. `, sure);
    if (!values.kept[p]) summary.append(" No distribution is kept here: it is a prompt’s.");
    else if (!values.learned[p]) summary.append(" Not to be learned: outside the loss mask.");
  }
  function compare(p) {
    const there = $("other"), found = make("p");
    const heading = make("h3", "First choices of ", make("span", data.other));
    heading.lastChild.className = "them-text";
    for (let k = 0; k < firsts; k++) {
      const number = values.otherIds[p * firsts + k];
      if (number !== none) found.append(k ? ", " : "", make("code", spelled(number)), ` ${percent(Math.exp(values.otherOwn[p * firsts + k]))}`);
    }
    there.append(heading, found);
    const divergence = values.divergence[p];
    $("summary").append(` There ${values.otherEntropy[p].toFixed(2)} nats; KL at least ${divergence.toFixed(divergence < 0.1 ? 4 : 2)} nats.`);
  }

  // One token is kept, by click, key or link; another may be looked at meanwhile.
  const LINK_AFTER_MS = 200; // browsers refuse a hundred links in some seconds, as of a key that is held down
  let kept = null, linking = 0;
  function keep(row, index, { focus = false, scroll = false, link = true } = {}) {
    if (kept) {
      const old = kept[0].tokens[kept[1]];
      old.classList.remove("here");
      old.removeAttribute("role");
      old.tabIndex = -1;
    }
    kept = [row, index];
    const token = row.tokens[index];
    token.classList.add("here");
    token.tabIndex = 0;
    token.setAttribute("role", "button");
    show(row, index);
    if (scroll) token.scrollIntoView({ block: "center" });
    if (focus) token.focus({ preventScroll: scroll });
    clearTimeout(linking);
    if (link) linking = setTimeout(() => history.replaceState(null, "", `#row=${row.number}&token=${index}`), LINK_AFTER_MS);
  }
  function follow() {
    const found = /^#row=(\d+)(?:&token=(\d+))?$/.exec(location.hash);
    const row = found && rows.get(Number(found[1]));
    if (!row) return;
    if (found[2] === undefined) row.element.scrollIntoView();
    else if (Number(found[2]) <= row.length) keep(row, Number(found[2]), { focus: true, scroll: true, link: false });
  }

  const texts = $("texts");
  const at = (event) => event.target instanceof Element && place.get(event.target.closest("i"));
  texts.addEventListener("click", (event) => {
    const found = at(event);
    if (found) keep(...found, { focus: true });
  });
  texts.addEventListener("pointerover", (event) => {
    if (event.pointerType !== "mouse") return;
    const found = at(event);
    if (found) show(...found);
  });
  texts.addEventListener("pointerleave", () => kept && show(...kept));
  $("close").addEventListener("click", () => {
    $("panel").hidden = true;
    if (kept) kept[0].tokens[kept[1]].focus({ preventScroll: true });
  });

  // Keys: by token, by line, by row.
  function byLine(row, index, step) {
    const box = row.tokens[index].getBoundingClientRect(), middle = (box.left + box.right) / 2;
    let best = null, top = null, distance = Infinity;
    for (let i = index + step; i >= 0 && i <= row.length; i += step) {
      const [other] = row.tokens[i].getClientRects();
      if (!other || Math.abs(other.top - box.top) < box.height / 2) continue;
      if (top !== null && Math.abs(other.top - top) > other.height / 2) break;
      top = other.top;
      const away = Math.abs((other.left + other.right) / 2 - middle);
      if (away < distance) [best, distance] = [i, away];
    }
    return best;
  }
  texts.addEventListener("keydown", (event) => {
    if (!kept || event.ctrlKey || event.metaKey || event.altKey) return;
    const [row, index] = kept, here = order.indexOf(row);
    const moves = {
      ArrowRight: () => (index < row.length ? [row, index + 1] : order[here + 1] && [order[here + 1], 0]),
      ArrowLeft: () => (index > 0 ? [row, index - 1] : order[here - 1] && [order[here - 1], order[here - 1].length]),
      ArrowDown: () => { const i = byLine(row, index, 1); return i === null ? order[here + 1] && [order[here + 1], 0] : [row, i]; },
      ArrowUp: () => { const i = byLine(row, index, -1); return i === null ? order[here - 1] && [order[here - 1], order[here - 1].length] : [row, i]; },
      Home: () => [row, 0],
      End: () => [row, row.length],
      PageDown: () => order[here + 1] && [order[here + 1], 0],
      PageUp: () => order[here - 1] && [order[here - 1], 0],
      Enter: () => [row, index],
      Escape: () => { $("panel").hidden = matchMedia("(max-width: 56rem)").matches; },
      " ": () => [row, index],
    };
    if (!Object.hasOwn(moves, event.key)) return;
    event.preventDefault();
    const next = moves[event.key]();
    if (next) {
      keep(...next, { focus: true });
      next[0].tokens[next[1]].scrollIntoView({ block: "nearest" });
    }
  });

  // The search.
  const MOST = 50;
  function list(found, what) {
    $("found").hidden = false;
    $("count").textContent = what;
    $("results").replaceChildren(...found.map(([row, index, note]) => {
      const context = (from, to) => row.tokens.slice(Math.max(0, from), to).map(textOf).join("").replace(/\s+/g, " ");
      const link = make("a", context(index - 8, index).slice(-50), make("b", index < row.length ? textOf(row.tokens[index]) || "\u2026" : row.tokens[index].textContent), context(index + 1, Math.min(index + 9, row.length)).slice(0, 50));
      link.href = `#row=${row.number}&token=${index}`;
      return make("li", link, make("small", ` row ${row.number}${note ? `, ${note}` : ""}`));
    }));
  }
  function find() {
    const query = $("query").value.toLowerCase();
    if (!query.trim()) {
      $("found").hidden = true;
      return;
    }
    const found = [];
    let count = 0;
    for (const row of order) {
      row.texts ??= row.tokens.slice(0, row.length).map((token) => textOf(token).toLowerCase());
      const whole = row.texts.join("");
      let index = 0, end = row.texts[0].length;
      for (let i = whole.indexOf(query); i >= 0; i = whole.indexOf(query, i + query.length)) {
        while (end <= i) end += row.texts[++index].length;
        count++;
        if (found.length < MOST) found.push([row, index, ""]);
      }
    }
    list(found, count > MOST ? `${count} places, of which the first ${MOST}` : `${count} place${count === 1 ? "" : "s"}`);
  }
  function highest() {
    const found = [], { unit } = data.measures[measure];
    for (const row of order) {
      for (let i = 1; i <= row.length; i++) {
        const p = row.start + i - 1, value = measured[measure](p);
        if (!Number.isNaN(value) && values.learned[p]) found.push([row, i, value]);
      }
    }
    const surprise = ([row, i]) => measured.surprise(row.start + i - 1);
    found.sort((a, b) => (a[2] === b[2] ? surprise(b) - surprise(a) : b[2] - a[2]));
    list(found.slice(0, MOST).map(([row, i, value]) => [row, i, format[unit](value)]), `highest first: ${$("measure").selectedOptions[0].textContent}`);
  }
  let waiting = 0;
  $("query").addEventListener("input", () => {
    clearTimeout(waiting);
    waiting = setTimeout(find, 120);
  });
  $("highest").addEventListener("click", highest);
  $("hide").addEventListener("click", () => { $("found").hidden = true; });
  $("measure").addEventListener("change", () => {
    paint();
    if (!$("found").hidden && !$("query").value.trim()) highest();
  });

  paint();
  for (const row of order) for (const token of row.tokens) token.tabIndex = -1;
  order[0].tokens[0].tabIndex = 0;
  texts.addEventListener("focusin", (event) => {
    const found = at(event);
    if (found && !kept) keep(...found, { link: false });
  });
  addEventListener("hashchange", follow);
  new ResizeObserver(() => document.documentElement.style.setProperty("--tools", `${$("tools").offsetHeight}px`)).observe($("tools"));
  follow();
  if (!kept && matchMedia("(min-width: 56.01rem)").matches) {
    // Something to see at once: the most surprising of the first words.
    const [row] = order;
    const surprise = (i) => (values.kept[row.start + i - 1] && /\p{L}{3}/u.test(textOf(row.tokens[i])) ? measured.surprise(row.start + i - 1) : -1);
    let most = 1;
    for (let i = 2; i < Math.min(row.length, 80); i++) if (surprise(i) > surprise(most)) most = i;
    keep(row, most, { link: false });
  }
})();
