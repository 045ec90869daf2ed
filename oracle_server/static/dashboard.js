// The page: asks for /v1/dashboard every few seconds with the key that was typed in, and shows what it says.
// What comes from the server is written as text only, never as markup.
"use strict";

const PERIOD_MS = 3000;
const LONGEST_PAUSE_MS = 15000;
const TIMEOUT_MS = 10000;
const STORED_KEY = "oracle-api-key";
const SVG = "http://www.w3.org/2000/svg";
const COLOURS = 7; // the eighth is for all others together

const at = (id) => document.getElementById(id);

// ---------------------------------------------------------------------------------------------- elements and words

/** An element; `attributes` are set as such, `children` are elements or texts. */
function make(tag, attributes = {}, ...children) {
  const svg = ["svg", "g", "path", "rect", "line", "text", "title"].includes(tag);
  const element = svg ? document.createElementNS(SVG, tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value !== null && value !== undefined) element.setAttribute(name, value);
  }
  element.append(...children.map((child) => (child instanceof Node ? child : String(child))));
  return element;
}

const whole = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });
const short = new Intl.NumberFormat("en", { notation: "compact", maximumFractionDigits: 1 });
const count = (n) => whole.format(n);

function rate(perSecond) {
  if (perSecond === 0) return "0 / s";
  return `${perSecond < 10 ? perSecond.toPrecision(2) : count(perSecond)} / s`;
}

const two = (n) => String(n).padStart(2, "0");

/** A time of day here; with the date where it is not `today`'s. */
function clock(moment, today = new Date(), seconds = true) {
  const day = `${moment.getFullYear()}-${two(moment.getMonth() + 1)}-${two(moment.getDate())}`;
  const time = `${two(moment.getHours())}:${two(moment.getMinutes())}${seconds ? `:${two(moment.getSeconds())}` : ""}`;
  return moment.toDateString() === today.toDateString() ? time : `${day} ${time}`;
}

function duration(seconds) {
  const steps = [[60, "s"], [60, "min"], [24, "h"], [365, "days"], [Infinity, "years"]];
  let value = seconds;
  for (const [size, unit] of steps) {
    if (value < size * 1.5 || size === Infinity) {
      return `${value < 10 && unit !== "s" ? value.toFixed(1) : count(value)} ${unit}`;
    }
    value /= size;
  }
  return "";
}

/** When an account runs out at its present rate: [in short, the moment]. */
function forecast(account, now) {
  if (account.remaining === 0) return ["used up", ""];
  if (account.seconds_left === null) return ["not at this rate", "nothing was charged in the last minute"];
  if (account.seconds_left > 3e9) return [`in ${duration(account.seconds_left)}`, ""];
  const moment = new Date(now.getTime() + 1000 * account.seconds_left);
  return [`in ${duration(account.seconds_left)}`, clock(moment, now, account.seconds_left < 3600)];
}

// ------------------------------------------------------------------------------------------------------- the parts

/** Replaces the children of an element, unless they would be the same: a selection in them stays. */
function show(element, signature, children) {
  const text = JSON.stringify(signature);
  if (element.dataset.shown === text) return;
  element.dataset.shown = text;
  element.replaceChildren(...children());
}

/** Each client's colour: where there are more clients than colours, those that spent least share the last one. */
function coloursOf(accounts) {
  const ranked = accounts.length <= COLOURS + 1 ? accounts : [...accounts].sort((a, b) => b.spent - a.spent).slice(0, COLOURS);
  const chosen = accounts.filter((account) => ranked.includes(account)).map((account) => account.client);
  return new Map(accounts.map(({ client }) => [client, `c${chosen.includes(client) ? chosen.indexOf(client) : COLOURS}`]));
}

function showVerification(v, now) {
  const section = at("verification");
  section.className = v.state;
  section.setAttribute("role", v.state === "broken" ? "alert" : "group"); // else each refresh would be read aloud
  const ago = v.checked_at === null ? "" : `checked ${duration(Math.max(0, (now - new Date(v.checked_at)) / 1000))} ago`;
  const again = v.walks === 0 ? "" : `all of it checked again at ${clock(new Date(v.walked_at), now)}`;
  const parts = {
    verified: () => [
      make("strong", {}, "The ledger is whole"),
      make("span", {}, `entries 1 to ${count(v.verified)} verified, head signature ok`),
      make("span", {}, [ago, again].filter(Boolean).join(" · ")),
    ],
    checking: () => [
      make("strong", {}, "The ledger is being verified"),
      make("span", {}, `${count(v.verified)} of ${count(Math.max(v.entries, v.verified))} entries so far, nothing wrong in them`),
    ],
    unavailable: () => [make("strong", {}, "The ledger cannot be read now"), make("span", {}, "the server tries again")],
    broken: () => [
      make("strong", {}, "The ledger was tampered with"),
      make("ul", {}, ...v.findings.map((text) => make("li", {}, text))),
      make("span", {}, "Do not trust the numbers below. On the server, 'oracle-server ledger verify' checks all of it; this "
        + "stays red until the server is started again."),
    ],
  };
  show(section, [v, ago], parts[v.state]);
}

function tile(label, value, more) {
  return make("div", { class: "tile" }, make("span", { class: "label" }, label), make("b", {}, value), make("span", { class: "more" }, more));
}

function showTiles(data, now) {
  const accounts = data.accounts;
  const sum = (name) => accounts.reduce((total, account) => total + account[name], 0);
  const refused = accounts.reduce((total, account) => total + totalOf(account.refusals), 0) + totalOf(data.refusals_without_key);
  const live = accounts.filter((account) => !account.revoked && account.seconds_left !== null && account.remaining > 0);
  const next = live.reduce((a, b) => (a === null || b.seconds_left < a.seconds_left ? b : a), null);
  const window = `mean of the last ${data.rate_window_s} s`;
  show(at("tiles"), [accounts, refused, now.getTime()], () => {
    if (!data.viewer.admin) {
      const [mine] = accounts;
      const [soon, when] = forecast(mine, now);
      return [
        tile("Left", count(mine.remaining), `of ${count(mine.budget)} queries`),
        tile("Spent", count(mine.spent), mine.held ? `and ${count(mine.held)} held by requests in flight` : "nothing in flight"),
        tile("Rate now", rate(mine.rate), window),
        tile("Runs out", soon, when),
      ];
    }
    const [soon, when] = next === null ? ["none", "nothing was charged in the last minute"] : forecast(next, now);
    return [
      tile("Clients", count(accounts.length), `${count(accounts.filter((a) => a.rate > 0).length)} asking now`),
      tile("Spent by all", count(sum("spent")), `of ${count(sum("budget"))} queries`),
      tile("Rate of all", rate(sum("rate")), window),
      tile("Next to run out", next === null ? soon : next.client, next === null ? when : `${soon} · ${when}`),
      tile("Refused", count(refused), `requests since ${clock(new Date(data.counting_since), now, false)}`),
    ];
  });
}

const totalOf = (refusals) => Object.values(refusals).reduce((a, b) => a + b, 0);

function meter(account, colour) {
  const share = (n) => (account.budget > 0 ? Math.min(100, (100 * n) / account.budget) : 0);
  const spent = share(account.spent), held = Math.min(100 - spent, share(account.held));
  const label = `${spent.toFixed(1)} % spent, ${held.toFixed(1)} % held`;
  return make("svg", { class: "meter", viewBox: "0 0 100 12", preserveAspectRatio: "none", role: "img", "aria-label": label },
    make("title", {}, label),
    make("rect", { class: "rest", width: 100, height: 12 }),
    make("rect", { class: `fill ${colour}`, width: spent, height: 12 }),
    make("rect", { class: "held", x: spent, width: held, height: 12 }));
}

function showAccounts(data, colours, now) {
  show(at("accounts").tBodies[0], [data.accounts, now.getTime()], () => data.accounts.map((account) => {
    const cell = (label, text, kind = "number") => make("td", { class: kind, "data-label": label }, text);
    const [soon, when] = forecast(account, now);
    const runsOut = make("td", { "data-label": "runs out" }, account.remaining === 0 ? make("span", { class: "gone" }, soon) : soon, " ",
      make("span", { class: "quiet" }, when && account.seconds_left !== null ? when : ""));
    return make("tr", { "data-client": account.client },
      make("th", { scope: "row" }, make("span", { class: `swatch ${colours.get(account.client)}` }), account.client,
        ...(account.revoked ? [" ", make("span", { class: "gone" }, "revoked")] : [])),
      make("td", { class: "wide" }, meter(account, colours.get(account.client))),
      cell("budget", count(account.budget)), cell("spent", count(account.spent)), cell("held", count(account.held)),
      cell("left", count(account.remaining)), cell("rate", rate(account.rate)), runsOut, cell("refused", count(totalOf(account.refusals))));
  }));
  at("accounts-note").textContent = `In queries: one is one image through the classifier. Held is set aside for requests in flight. `
    + `The rate is the mean of the last ${data.rate_window_s} s, and the forecast is what is left at that rate.`;
}

function showEntries(data, now) {
  const entries = data.entries;
  show(at("entries").tBodies[0], entries, () => entries.map((entry) => {
    const mark = { true: ["good", "✓ verified"], false: ["", "✗ broken"], null: ["quiet", "not yet"] }[String(entry.verified)];
    const queries = entry.kind === "budget" ? `= ${count(entry.amount)}` : entry.rows === 0 ? "" : count(entry.rows);
    const moment = new Date(entry.at);
    return make("tr", { class: entry.verified === false ? "bad" : null, "data-seq": entry.seq },
      make("td", { class: "number" }, count(entry.seq)),
      make("td", { title: entry.at }, clock(moment, now)),
      make("td", { class: "of-all" }, entry.client),
      make("td", { title: entry.note }, make("span", { class: `kind ${entry.kind}` }, entry.kind)),
      make("td", { class: "number" }, queries),
      make("td", { class: "mono" }, entry.key ?? ""),
      make("td", { class: "mono", title: entry.hash }, `${(entry.hash ?? "none").slice(0, 16)}…`),
      make("td", { class: mark[0] }, mark[1]));
  }));
}

function showRefusals(data, now) {
  const rows = data.accounts.map((account) => [account.client, account.refusals]);
  if (data.viewer.admin) rows.push(["no valid key", data.refusals_without_key]);
  const flat = rows.flatMap(([client, refusals]) => Object.entries(refusals).map(([code, n]) => [client, code, n]));
  flat.sort((a, b) => b[2] - a[2]);
  show(at("refusals").tBodies[0], flat, () => (flat.length === 0
    ? [make("tr", {}, make("td", { colspan: 3, class: "quiet" }, "none"))]
    : flat.map(([client, code, n]) => make("tr", {}, make("td", { class: "of-all" }, client), make("td", {}, code), make("td", { class: "number" }, count(n))))));
  at("refusals-note").textContent = `Counted by this server since it was started, ${clock(new Date(data.counting_since), now)}. `
    + "Nothing that was refused was charged.";
}

// -------------------------------------------------------------------------------------------------------- the plots

/** Axis marks from 0 to at least `top`: 1, 2 or 5 times a power of ten apart, whole numbers. */
function ticks(top) {
  const rough = Math.max(top, 1) / 4;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = Math.max(1, [1, 2, 5, 10].map((k) => k * power).find((s) => s >= rough));
  const marks = [0];
  while (marks.at(-1) < top) marks.push(marks.at(-1) + step);
  return marks.length > 1 ? marks : [0, step];
}

const MINUTE = 60000;
const TIME_STEPS = [1 / 60, 1 / 30, 1 / 12, 1 / 6, 0.5, 1, 2, 5, 10, 15, 30, 60, 120, 180, 360, 720, 1440, 2880, 7200, 14400, 43200, 129600, 525600]
  .map((minutes) => minutes * MINUTE);

/** Round local times between two moments (milliseconds), at most about six. */
function timeTicks(from, to) {
  const step = TIME_STEPS.find((s) => (to - from) / s <= 6) ?? (to - from) / 6;
  const zone = new Date(to).getTimezoneOffset() * MINUTE;
  const marks = [];
  for (let t = Math.ceil((from - zone) / step) * step + zone; t <= to; t += step) marks.push(t);
  const label = (t) => {
    const moment = new Date(t);
    if (step >= 1440 * MINUTE) return moment.toLocaleDateString("en", { month: "short", day: "numeric" });
    return `${two(moment.getHours())}:${two(moment.getMinutes())}${step < MINUTE ? `:${two(moment.getSeconds())}` : ""}`;
  };
  return marks.map((t) => [t, label(t)]);
}

/** The series of a plot: each client with a colour of its own, and the others together. */
function seriesOf(spending, colours) {
  const sum = (rows) => rows.reduce((a, b) => a + b, 0);
  const all = spending.clients.map((c) => ({ name: c.client, rows: c.rows, colour: colours.get(c.client), total: sum(c.rows) }));
  const own = all.filter((s) => s.colour !== `c${COLOURS}`);
  const others = all.filter((s) => s.colour === `c${COLOURS}`);
  if (others.length <= 1) return all;
  const rows = others[0].rows.map((_, i) => others.reduce((a, s) => a + s.rows[i], 0));
  return [...own, { name: `${others.length} others`, rows, colour: `c${COLOURS}`, total: sum(rows) }];
}

class Plot {
  /** A plot in section `id`: `cumulative` lines, else bars upon each other. */
  constructor(id, cumulative) {
    this.section = at(id);
    this.svg = this.section.querySelector("svg");
    this.legend = this.section.querySelector(".legend");
    this.title = this.section.querySelector("h2");
    this.cumulative = cumulative;
    this.cursor = null; // the bucket that is pointed at
    new ResizeObserver(() => this.draw()).observe(this.svg);
    this.svg.addEventListener("pointermove", (event) => this.point(event));
    this.svg.addEventListener("pointerleave", () => this.moveTo(null));
    this.svg.addEventListener("blur", () => this.moveTo(null));
    this.svg.addEventListener("keydown", (event) => this.key(event));
  }

  update(spending, colours, now) {
    const { start_ms: start, step_ms: step } = spending;
    this.series = seriesOf(spending, colours);
    this.buckets = this.series[0]?.rows.length ?? 0;
    Object.assign(this, { start, step, now });
    this.title.textContent = this.cumulative ? `Spent since ${clock(new Date(start), now)}` : `Charged each ${duration(step / 1000)}`;
    const said = this.series.map((s) => `${s.name} ${count(s.total)}`).join(", ");
    this.svg.setAttribute("aria-label", `${this.title.textContent}, in queries: ${said || "no clients"}. Arrow keys read values.`);
    this.draw();
  }

  clear() {
    this.series = undefined;
    this.cursor = null;
    this.svg.removeAttribute("aria-label");
    for (const part of [this.svg, this.legend, this.title]) part.replaceChildren();
  }

  values(series) {
    if (!this.cumulative) return series.rows;
    let total = 0;
    return series.rows.map((rows) => (total += rows));
  }

  draw() {
    if (!this.series) return;
    const width = this.svg.clientWidth, height = this.svg.clientHeight;
    if (width === 0) return;
    const left = 44, right = 10, top = 8, bottom = 22;
    const lines = this.series.map((s) => ({ ...s, values: this.values(s) }));
    const highest = this.cumulative
      ? Math.max(0, ...lines.map((s) => s.values.at(-1) ?? 0))
      : Math.max(0, ...Array.from({ length: this.buckets }, (_, i) => lines.reduce((a, s) => a + s.values[i], 0)));
    const marks = ticks(highest);
    const end = this.start + this.buckets * this.step;
    this.x = (t) => left + ((t - this.start) / (end - this.start)) * (width - left - right);
    const y = (value) => top + (1 - value / marks.at(-1)) * (height - top - bottom);
    this.svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
    const drawn = [];
    for (const mark of marks) {
      drawn.push(make("line", { class: "grid", x1: left, x2: width - right, y1: y(mark), y2: y(mark) }));
      drawn.push(make("text", { x: left - 6, y: y(mark) + 4, "text-anchor": "end" }, short.format(mark)));
    }
    for (const [t, label] of timeTicks(this.start, end)) {
      const x = this.x(t);
      if (x > left + 12 && x < width - right - 12) drawn.push(make("text", { x, y: height - 5, "text-anchor": "middle" }, label));
    }
    drawn.push(...(this.cumulative ? this.lines(lines, y) : this.bars(lines, y)));
    if (this.cursor !== null && this.cursor < this.buckets) {
      const x = this.x(this.start + (this.cursor + 0.5) * this.step);
      drawn.push(make("line", { class: "cursor", x1: x, x2: x, y1: top, y2: height - bottom }));
    }
    this.svg.replaceChildren(...drawn);
    this.drawLegend(lines);
  }

  lines(lines, y) {
    const now = Math.min(this.now.getTime(), this.start + this.buckets * this.step);
    return lines.flatMap((s) => {
      const corners = s.values.map((value, i) => `${this.x(Math.min(this.start + (i + 1) * this.step, now)).toFixed(1)},${y(value).toFixed(1)}`);
      const path = `M${this.x(this.start).toFixed(1)},${y(0).toFixed(1)}L${corners.join("L")}`;
      const line = make("path", { class: `stroke ${s.colour}`, d: path });
      if (lines.length > 1) return [line];
      return [make("path", { class: `area ${s.colour}`, d: `${path}L${this.x(now).toFixed(1)},${y(0)}Z` }), line];
    });
  }

  bars(lines, y) {
    const wide = Math.max(0.8, this.x(this.start + this.step) - this.x(this.start) - 1);
    const under = new Array(this.buckets).fill(0);
    return lines.map((s) => make("path", {
      class: `fill ${s.colour}`,
      d: s.values.map((value, i) => {
        if (value <= 0) return "";
        const low = y(under[i]), high = y((under[i] += value));
        return `M${this.x(this.start + i * this.step).toFixed(1)},${low.toFixed(1)}h${wide.toFixed(1)}V${high.toFixed(1)}h-${wide.toFixed(1)}Z`;
      }).join(""),
    }));
  }

  drawLegend(lines) {
    const i = this.cursor;
    const chips = lines.map((s) => make("span", {}, make("span", { class: `swatch ${s.colour}` }), s.name,
      make("b", {}, count(i === null ? s.total : s.values[i] ?? 0))));
    if (i !== null) {
      const moment = new Date(this.start + (this.cumulative ? i + 1 : i) * this.step);
      chips.unshift(make("span", { class: "quiet" }, `${this.cumulative ? "until" : "from"} ${clock(moment, this.now)}`));
    }
    this.legend.replaceChildren(...chips);
  }

  point(event) {
    const box = this.svg.getBoundingClientRect();
    const from = this.x(this.start), to = this.x(this.start + this.step * this.buckets);
    const bucket = Math.floor(((event.clientX - box.left - from) / (to - from)) * this.buckets);
    this.moveTo(bucket >= 0 && bucket < this.buckets ? bucket : null);
  }

  key(event) {
    const last = this.buckets - 1, here = this.cursor ?? last + 1;
    const to = { ArrowLeft: Math.max(0, here - 1), ArrowRight: Math.min(last, here + 1), Home: 0, End: last }[event.key];
    if (to === undefined) return;
    event.preventDefault();
    this.legend.setAttribute("aria-live", "polite"); // said aloud for whoever reads by keys, not at each refresh
    this.moveTo(to);
  }

  moveTo(bucket) {
    if (bucket === null) this.legend.removeAttribute("aria-live");
    if (bucket === this.cursor || !this.series) return;
    this.cursor = bucket;
    this.draw();
  }
}

const plots = [new Plot("spent", true), new Plot("charged", false)];

// ------------------------------------------------------------------------------------------------- asking and showing

let key = sessionStorage.getItem(STORED_KEY);
let timer = null;
let asking = null; // the AbortController of the request in flight
let failures = 0;
let lastShown = null;

function say(state, text) {
  at("status").className = state;
  at("status").setAttribute("role", state === "lost" ? "alert" : "note");
  at("status").textContent = text;
  at("board").classList.toggle("stale", state === "lost");
}

function display(data) {
  const now = new Date(data.now);
  const colours = coloursOf(data.accounts);
  at("viewer").textContent = `· ${data.viewer.name}${data.viewer.admin ? " (admin)" : ""}`;
  at("board").classList.toggle("own", !data.viewer.admin);
  at("board").hidden = false;
  showVerification(data.verification, now);
  if (data.viewer.admin || data.accounts.length > 0) showTiles(data, now);
  showAccounts(data, colours, now);
  for (const plot of plots) plot.update(data.spending, colours, now);
  showEntries(data, now);
  showRefusals(data, now);
  lastShown = now;
}

function stop() {
  clearTimeout(timer);
  asking?.abort();
  asking = null;
}

/** Ask now, show the answer, and again after a while; whatever was asked before is dropped. */
async function refresh() {
  stop();
  if (key === null || document.hidden) return;
  const mine = (asking = new AbortController());
  const patience = setTimeout(() => mine.abort(), TIMEOUT_MS);
  let pause = PERIOD_MS;
  try {
    const window = document.querySelector("input[name=window]:checked").value;
    const answer = await fetch(`v1/dashboard?window=${window}`, {
      headers: { Authorization: `Bearer ${key}` }, cache: "no-store", credentials: "omit", redirect: "error", signal: mine.signal,
    });
    const body = await answer.json();
    if (asking !== mine) return;
    if (answer.status === 401) return forget("This key is not known to this server.");
    if (answer.status === 403) return forget(String(body.detail));
    if (!answer.ok) throw new Error(String(body.detail));
    failures = 0;
    display(body);
    say("live", `live · ${clock(lastShown, lastShown)}`);
  } catch (error) {
    if (asking !== mine) return;
    failures += 1;
    pause = Math.min(LONGEST_PAUSE_MS, 1000 * 2 ** (failures - 1));
    const why = error instanceof TypeError || error.name === "AbortError" || error instanceof SyntaxError ? "The server cannot be reached" : error.message;
    say("lost", `${why} · trying again${lastShown === null ? "" : ` · what is shown is of ${clock(lastShown)}`}`);
  } finally {
    clearTimeout(patience);
  }
  if (asking === mine) timer = setTimeout(refresh, pause);
}

function ask() {
  stop();
  at("login").hidden = true;
  at("controls").hidden = at("status").hidden = false;
  failures = 0;
  say("", "asking …");
  refresh();
}

/** Drop the key and all that was shown with it. */
function forget(why) {
  stop();
  key = null;
  lastShown = null;
  sessionStorage.removeItem(STORED_KEY);
  for (const id of ["verification", "tiles"]) at(id).replaceChildren();
  for (const id of ["accounts", "entries", "refusals"]) at(id).tBodies[0].replaceChildren();
  for (const element of document.querySelectorAll("[data-shown]")) delete element.dataset.shown;
  for (const plot of plots) plot.clear();
  at("viewer").textContent = "";
  at("board").hidden = at("controls").hidden = at("status").hidden = true;
  at("login").hidden = false;
  at("login-error").textContent = why;
  at("key").value = "";
  at("key").focus();
}

at("login").addEventListener("submit", (event) => {
  event.preventDefault();
  const typed = at("key").value.trim();
  at("key").value = "";
  if (!/^[!-~]+$/.test(typed)) return forget("This is not written as a key: it has letters, digits, - and _ only.");
  key = typed;
  sessionStorage.setItem(STORED_KEY, key);
  ask();
});
at("forget").addEventListener("click", () => forget(""));
at("windows").addEventListener("change", refresh);
document.addEventListener("visibilitychange", () => {
  if (document.hidden && key !== null) {
    stop();
    say("", "paused while the page is hidden");
  } else {
    refresh();
  }
});

if (key === null) forget(""); else ask();
