"use strict";
// Whatever a model or a person wrote enters the page as textContent, never as HTML.

const KINDS = ["text", "retained", "middle", "skipped", "summary"];
const byId = (id) => document.getElementById(id);
const page = {};
for (const id of ["title", "plan", "new", "chat", "empty", "problem", "status", "images", "form", "file", "add", "text", "send", "stop"]) {
  page[id] = byId(id);
}
let limits = null;
let waiting = []; // images for the next question: {id, width, height, name}
let uploading = 0;
let running = null; // of the answer on its way

function make(tag, className, text) {
  const element = document.createElement(tag);
  if (className) element.className = className;
  if (text !== undefined) element.textContent = text;
  return element;
}

function problem(message) {
  page.problem.hidden = !message;
  page.problem.textContent = message || "";
}

function update() {
  const ready = limits !== null;
  page.plan.disabled = !ready;
  page.new.disabled = !ready;
  page.add.disabled = !ready || running !== null || waiting.length + uploading >= limits.images;
  page.send.disabled = !ready || running !== null || uploading > 0 || !page.text.value.trim();
  page.send.hidden = running !== null;
  page.stop.hidden = running === null;
  page.empty.hidden = page.chat.querySelector("article") !== null;
  page.text.style.height = "auto";
  page.text.style.height = `${page.text.scrollHeight + 2}px`;
}

async function request(path, options = {}) {
  let response;
  try {
    response = await fetch(path, { credentials: "same-origin", ...options });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error("the server cannot be reached");
  }
  if (response.ok) return response;
  const body = await response.json().catch(() => ({}));
  if (response.status === 401) await open();
  throw new Error(body.error || `the server answered with status ${response.status}`);
}

async function open() {
  const response = await fetch("api/chat", { credentials: "same-origin" });
  const body = await response.json();
  if (!response.ok) throw new Error(body.error);
  show(body);
}

function show(state) {
  limits = state.limits;
  page.title.textContent = state.title;
  document.title = state.title;
  const chosen = page.plan.value;
  page.plan.replaceChildren(...state.plans.map((plan) => {
    const option = make("option", "", plan.name === plan.rules ? plan.name : `${plan.name} (${plan.rules})`);
    option.value = plan.name;
    return option;
  }));
  if (state.plans.some((plan) => plan.name === chosen)) page.plan.value = chosen;
  for (const article of page.chat.querySelectorAll("article")) article.remove();
  for (const exchange of state.exchanges) {
    addQuestion(exchange.text, exchange.images);
    finish(addAnswer(exchange.answer.plan), exchange.answer);
  }
  waiting = state.waiting;
  showWaiting();
}

function picture(id, text) {
  const image = make("img");
  image.src = `api/images/${id}`;
  image.alt = text;
  return image;
}

function showWaiting() {
  page.images.replaceChildren(...waiting.map((upload, index) => {
    const item = make("li");
    const remove = make("button", "small", "Remove");
    const name = upload.name || `image ${index + 1}`;
    remove.type = "button";
    remove.disabled = running !== null;
    remove.setAttribute("aria-label", `Remove ${name}`);
    remove.addEventListener("click", () => takeAway(upload.id));
    item.append(picture(upload.id, `${name}, ${upload.width} by ${upload.height} pixels`), remove);
    return item;
  }));
  update();
}

async function takeAway(id) {
  problem("");
  try {
    await request(`api/images/${id}`, { method: "DELETE" });
    waiting = waiting.filter((upload) => upload.id !== id);
  } catch (error) {
    problem(error.message);
  }
  showWaiting();
  page.text.focus();
}

async function upload(files) {
  problem("");
  const problems = [];
  for (const file of files) {
    if (waiting.length >= limits.images) {
      problems.push(`${file.name}: at most ${limits.images} images in a question`);
      break;
    }
    uploading += 1;
    page.status.textContent = `Uploading ${file.name}`;
    update();
    try {
      if (file.size > limits.upload_mb * 2 ** 20) {
        throw new Error(`larger than ${limits.upload_mb} MiB, which is the most that is read`);
      }
      const response = await request("api/images", {
        method: "POST", body: file, headers: { "Content-Type": "application/octet-stream" },
      });
      waiting.push({ ...(await response.json()), name: file.name });
    } catch (error) {
      problems.push(`${file.name}: ${error.message.replace(/^image: /, "")}`);
    }
    uploading -= 1;
  }
  page.status.textContent = "";
  page.file.value = "";
  problem(problems.join("\n"));
  showWaiting();
}

function addQuestion(text, images) {
  const article = make("article", "question");
  if (images.length) {
    const row = make("div", "pictures");
    row.append(...images.map((id, index) => picture(id, `image ${index + 1} of the question`)));
    article.append(row);
  }
  article.append(make("p", "", text));
  page.chat.append(article);
  return article;
}

function addAnswer(plan) {
  const article = make("article", "answer");
  article.append(make("div", "by", `plan ${plan}`), make("p", "words"));
  page.chat.append(article);
  return article;
}

function finish(article, answer) {
  const words = article.querySelector(".words");
  words.textContent = answer.text || "(an empty answer)";
  words.classList.toggle("hint", !answer.text);
  if (answer.stopped) article.querySelector(".by").append(", stopped");
  else if (!answer.finished) article.querySelector(".by").append(", cut at the most tokens of an answer");
  article.append(figures(answer));
}

function figures(answer) {
  const box = make("div", "figures");
  const total = Object.values(answer.prompt).reduce((sum, count) => sum + count, 0);
  const bar = make("div", "bar");
  const list = make("ul", "kinds");
  bar.setAttribute("aria-hidden", "true");
  list.setAttribute("aria-label", "Tokens of the prompt by kind");
  for (const kind of KINDS.filter((name) => answer.prompt[name])) {
    const part = make("span", kind);
    part.style.flexGrow = answer.prompt[kind];
    bar.append(part);
    list.append(make("li", kind, `${kind} ${answer.prompt[kind]}`));
  }
  const facts = make("dl");
  const rows = [
    ["Prompt", `${total} tokens`],
    ["Answer", `${answer.tokens} tokens`],
    ["First token", milliseconds(answer.first_token_ms), "Images and prefill"],
    ["Decode", answer.decode_ms === null ? "–" : `${milliseconds(answer.decode_ms)}/token`, "Per further token"],
    ["KV memory", bytes(answer.kv_bytes), "Keys and values at the end of the answer"],
    ["Prefill", flops(answer.prefill_flops), "Decoder layers"],
    ["Waited", milliseconds(answer.waited_ms), "In the queue"],
  ];
  for (const [name, value, title] of rows) {
    const cell = make("div");
    if (title) cell.title = title;
    cell.append(make("dt", "", name), make("dd", "", value));
    facts.append(cell);
  }
  box.append(bar, list, facts);
  return box;
}

const digits = (value) => value.toLocaleString("en", { maximumSignificantDigits: 3 });
const milliseconds = (value) => (value >= 1000 ? `${digits(value / 1000)} s` : `${digits(value)} ms`);

function scaled(value, step, units) {
  let place = 0;
  while (value >= step && place < units.length - 1) {
    value /= step;
    place += 1;
  }
  return `${digits(value)} ${units[place]}`;
}

const bytes = (value) => scaled(value, 1024, ["B", "KiB", "MiB", "GiB"]);
const flops = (value) => scaled(value, 1000, ["FLOPs", "kFLOPs", "MFLOPs", "GFLOPs", "TFLOPs"]);

function toEnd(force) {
  const chat = page.chat;
  if (force || chat.scrollHeight - chat.scrollTop - chat.clientHeight < 160) chat.scrollTop = chat.scrollHeight;
}

async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      const [name, data] = part.split("\n");
      yield [name.slice("event: ".length), JSON.parse(data.slice("data: ".length))];
    }
  }
}

async function ask() {
  const text = page.text.value;
  const images = waiting.map((upload) => upload.id);
  const shown = waiting;
  problem("");
  running = new AbortController();
  page.text.value = "";
  waiting = [];
  const question = addQuestion(text, images);
  const answer = addAnswer(page.plan.value);
  answer.setAttribute("aria-busy", "true");
  showWaiting();
  toEnd(true);
  let isAnswered = false;
  try {
    const response = await request("api/ask", {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify({ text, plan: page.plan.value, images }),
      signal: running.signal,
    });
    isAnswered = await follow(response, answer);
  } catch (error) {
    if (error.name !== "AbortError") problem(error.message);
  }
  running = null;
  answer.removeAttribute("aria-busy");
  page.status.textContent = "";
  if (!isAnswered && question.isConnected) { // the server has not kept the question: it can be asked again
    if (!answer.querySelector(".figures")) {
      question.remove();
      answer.remove();
    }
    if (!page.text.value) page.text.value = text;
    waiting = shown;
  }
  showWaiting();
  toEnd(false);
  page.text.focus();
}

async function follow(response, answer) {
  const words = answer.querySelector(".words");
  for await (const [name, fields] of events(response)) {
    if (name === "queue") page.status.textContent = `Waiting: place ${fields.position} in the queue`;
    if (name === "start") page.status.textContent = "Answering";
    if (name === "piece") words.append(fields.text);
    if (name === "done") {
      finish(answer, fields);
      return Boolean(fields.text);
    }
    if (name === "error") throw new Error(fields.message);
    toEnd(false);
  }
  throw new Error("the server ended the answer too early");
}

async function attempt(path) {
  problem("");
  try {
    return await request(path, { method: "POST" });
  } catch (error) {
    problem(error.message);
    return null;
  }
}

page.form.addEventListener("submit", (event) => {
  event.preventDefault();
  if (!page.send.disabled) ask();
});
page.text.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    if (!page.send.disabled) ask();
  }
});
page.text.addEventListener("input", update);
page.add.addEventListener("click", () => page.file.click());
page.file.addEventListener("change", () => upload([...page.file.files]));
page.stop.addEventListener("click", () => attempt("api/stop"));
page.new.addEventListener("click", async () => {
  if (running) running.abort();
  const response = await attempt("api/new");
  if (response) show(await response.json());
  page.text.focus();
});
document.addEventListener("paste", (event) => {
  const files = [...event.clipboardData.files];
  if (files.length && !page.add.disabled) upload(files);
});
document.addEventListener("dragover", (event) => {
  event.preventDefault();
  document.body.classList.add("dragging");
});
document.addEventListener("dragleave", () => document.body.classList.remove("dragging"));
document.addEventListener("drop", (event) => {
  event.preventDefault();
  document.body.classList.remove("dragging");
  if (!page.add.disabled) upload([...event.dataTransfer.files]);
});
open().catch((error) => problem(error.message)).finally(update);
