// The chat page: conversations in localStorage, answers streamed from /v1/chat/completions. No build step, no libraries.
//
// A conversation is {id, title, started, messages}; a user message {role, text}; an assistant message {role, parts, note?,
// error?, figures?, left?}, its parts {type: "text", text} or {type: "tool", expression, result}, in the order they came. Each
// conversation has a key of its own, so that tabs do not erase each other's; in one that two write to, the last one wins.

import { renderMarkdown } from "./markdown.js";

const $ = (id) => document.getElementById(id);
const SUGGESTIONS = ["What is 12 + 7?", "Why is the sky blue?", "How many r are in strawberry?", "Write a short poem about the sea"];
const SETTINGS = { temperature: 0.8, top_k: 50, max_tokens: 256 };
const SENT = 80_000; // characters of messages in a request: in UTF-8 still less than the 256 KiB that the server takes
const TOKEN = /^[!-~]+$/; // what a header takes
const unsaved = {}; // what the browser would not store

function load(key, fallback) {
  if (key in unsaved) return unsaved[key] ?? fallback;
  try {
    return JSON.parse(localStorage.getItem("nanochat." + key)) ?? fallback;
  } catch {
    return fallback;
  }
}

// Without a value: removes it.
function store(key, value) {
  try {
    if (value === undefined) localStorage.removeItem("nanochat." + key);
    else localStorage.setItem("nanochat." + key, JSON.stringify(value));
    delete unsaved[key];
    return true;
  } catch (error) {
    unsaved[key] = value;
    if (error.name === "QuotaExceededError") announce("This browser's storage is full: delete old conversations to keep new ones.");
    else announce("This browser lets the page store nothing: conversations are gone when it is closed.");
    return false;
  }
}

let conversations = [];
let current = newConversation();
let settings = { ...SETTINGS, ...load("settings", {}) };
let running = null; // the AbortController of the answer that is streaming in
let editing = -1;
let leaving = false; // the page is being left: what breaks off now is no error

function newConversation() {
  return { id: crypto.randomUUID?.() ?? String(Date.now() + Math.random()), title: "", messages: [] };
}

const keyOf = ({ id }) => "conversation." + id;

// Called as soon as an answer begins, so that leaving the page does not lose it, and when it ends.
function save(conversation) {
  if (!conversations.includes(conversation)) return; // deleted meanwhile
  conversation.title = [...conversation.messages[0].text].slice(0, 60).join("");
  store(keyOf(conversation), conversation);
  drawHistory();
}

function loadConversations() {
  migrate();
  try {
    const keys = Object.keys(localStorage).filter((key) => key.startsWith("nanochat.conversation."));
    setConversations(keys.map((key) => load(key.slice("nanochat.".length), null)).filter((found) => Array.isArray(found?.messages)));
  } catch {
    // Storage is forbidden: this page begins with an empty list.
  }
  show(conversations.find(({ id }) => id === history.state) ?? current);
}

// All conversations used to be in one list, the newest first. They leave it one by one, so that none is lost where storage
// is almost full; those that do not fit stay in it until there is room.
function migrate() {
  const old = load("conversations", []);
  while (old.length) {
    const first = old.shift();
    store("conversations", old);
    const moved = load(keyOf(first), null) || store(keyOf(first), { ...first, started: old.length });
    if (!moved) return store("conversations", [first, ...old]);
  }
}

function setConversations(list) {
  conversations = list.sort((a, b) => b.started - a.started);
  drawHistory();
}

// Another tab has saved or deleted a conversation. Read anew, as this tab may have saved it since.
function follow({ key }) {
  if (!key?.startsWith("nanochat.conversation.")) return;
  const theirs = load(key.slice("nanochat.".length), null);
  const mine = conversations.find((conversation) => key === "nanochat." + keyOf(conversation));
  if (!theirs) return drop(mine);
  if (!mine) return setConversations([theirs, ...conversations]);
  if (mine === current && running) return; // it is saved as it is here when the answer ends
  const text = unsent();
  Object.assign(mine, theirs);
  drawHistory();
  if (mine !== current) return;
  if (text && mine.messages[editing]?.role === "user") return edit(editing, text);
  editing = -1;
  drawMessages();
}

// ---- drawing -------------------------------------------------------------------------------------------------------

function element(tag, options = {}, ...children) {
  const { on = {}, ...properties } = options;
  const node = Object.assign(document.createElement(tag), properties);
  for (const [event, handler] of Object.entries(on)) node.addEventListener(event, handler);
  node.append(...children);
  return node;
}

const button = (label, click, className = "") =>
  element("button", { type: "button", textContent: label, className, on: { click } });

function drawHistory() {
  $("history").replaceChildren(
    ...conversations.map((conversation) => {
      const open = button(conversation.title, () => show(conversation), "open");
      const remove = button("×", () => deleteConversation(conversation), "delete");
      remove.setAttribute("aria-label", `Delete ${conversation.title}`);
      if (conversation === current) open.ariaCurrent = "true";
      return element("li", { className: conversation === current ? "current" : "" }, open, remove);
    }),
  );
}

function drawMessages() {
  $("empty").hidden = current.messages.length > 0;
  $("messages").replaceChildren(...current.messages.map(messageNode));
}

function redrawLast() {
  const last = current.messages.length - 1;
  const scroller = $("scroller");
  const atEnd = scroller.scrollHeight - scroller.scrollTop - scroller.clientHeight < 80;
  update($("messages").children[last], messageNode(current.messages[last], last));
  if (atEnd) scroller.scrollTop = scroller.scrollHeight;
}

// Blocks of the answer that did not change stay the same nodes: they may be selected, focused or pressed just now.
function update(old, fresh) {
  const [from, to] = [old, fresh].map((node) => node?.querySelector(":scope > .body"));
  if (!from || !to) return old?.replaceWith(fresh);
  const [before, after] = [from, to].map((body) => body.querySelectorAll("pre > button"));
  before.forEach((node, i) => node.until > Date.now() && after[i] && say(after[i], node.textContent, node.until));
  let same = 0;
  while (same < to.childNodes.length && from.childNodes[same]?.isEqualNode(to.childNodes[same])) same++;
  while (from.childNodes.length > same) from.lastChild.remove();
  from.append(...[...to.childNodes].slice(same));
  while (old.lastChild !== from) old.lastChild.remove();
  while (to.nextSibling) old.append(to.nextSibling);
}

function messageNode(message, index) {
  const node = element("li", { className: "message " + message.role });
  if (index === editing) {
    node.append(editor(message, index));
    return node;
  }
  const body = element("div", { className: "body" });
  node.append(element("span", { className: "unseen", textContent: message.role === "user" ? "You:" : "Model:" }), body);
  const live = running && index === current.messages.length - 1;
  if (message.role === "user") {
    body.textContent = message.text;
    node.append(element("div", { className: "actions" }, copyButton(() => message.text), button("Edit", () => settled() && edit(index), "again")));
    return node;
  }
  for (const part of message.parts) body.append(...(part.type === "tool" ? [toolCard(part)] : markdown(part.text)));
  if (live) body.append(element("span", { className: "waiting" }));
  // A page that was left during the answer had no time to say so.
  const end = message.note ?? (live || message.error || message.figures ? "" : "Not finished.");
  const left = message.left ? `The oldest ${message.left} messages no longer fit the model's context and were left out.` : "";
  const note = [left, end].filter(Boolean).join(" ");
  if (note) node.append(element("p", { className: "note", textContent: note }));
  if (message.error) node.append(element("p", { className: "note error", textContent: message.error }));
  if (!live) {
    const actions = element("div", { className: "actions" }, copyButton(() => plainText(message)));
    actions.append(button(message.error ? "Try again" : "Regenerate", () => regenerate(index), "again"));
    if (message.figures) actions.append(element("span", { className: "figures", textContent: message.figures }));
    node.append(actions);
  }
  return node;
}

function markdown(text) {
  const holder = element("div");
  holder.innerHTML = renderMarkdown(text); // escaped there, before any tag is added
  for (const code of holder.querySelectorAll("pre > code")) {
    code.tabIndex = 0; // to scroll it with the keyboard
    code.after(copyButton(() => code.textContent));
  }
  return holder.childNodes;
}

const toolCard = ({ expression, result }) =>
  element(
    "div",
    { className: "tool", title: "The model called a tool" },
    element("span", { className: "label", textContent: "Tool" }),
    element("span", { textContent: expression }),
    element("span", { className: "arrow", textContent: "→" }),
    element("span", { className: "result", textContent: result ?? "failed" }),
  );

function copyButton(text) {
  const node = button("Copy", async () => {
    try {
      await navigator.clipboard.writeText(text());
      say(node, "Copied");
    } catch {
      say(node, "Not allowed");
    }
  });
  return node;
}

// On a copy button, for a moment; one that takes its place in a streaming answer says it until the same time.
function say(node, label, until = Date.now() + 1500) {
  node.textContent = label;
  node.until = until;
  setTimeout(() => node.until === until && (node.textContent = "Copy"), until - Date.now());
}

const plainText = (message) =>
  message.parts.map((part) => (part.type === "tool" ? `[${part.expression} = ${part.result ?? "failed"}]` : part.text)).join("");

// Below message number `index`, or the last.
function announce(text, index = $("messages").children.length - 1) {
  const above = $("messages").children[index];
  if (above?.textContent === text) return;
  const note = element("li", { className: "note error", textContent: text });
  $("messages").insertBefore(note, above?.nextSibling ?? null);
  note.scrollIntoView({ block: "nearest" });
}

// ---- acting --------------------------------------------------------------------------------------------------------

// Not on touch screens, where that brings up the keyboard.
const focusInput = () => matchMedia("(hover: none)").matches || $("input").focus();

function menu(open) {
  document.body.classList.toggle("menu-open", open);
  $("shade").hidden = !open;
  document.querySelector("main").inert = open; // Tab does not reach what is behind it
  $("menu").setAttribute("aria-expanded", String(open));
}

function show(conversation) {
  menu(false);
  if (conversation !== current && conversations.includes(current) && !settled()) return; // else it has been deleted
  focusInput();
  history.replaceState(conversation.id, ""); // opened again when the page is loaded again
  if (conversation === current) return;
  running?.abort();
  running = null; // now, not when the stream has noticed: what is drawn below is not streaming
  busy(false);
  current = conversation;
  editing = -1;
  drawHistory();
  drawMessages();
  $("scroller").scrollTop = $("scroller").scrollHeight;
}

function deleteConversation(conversation) {
  if (!confirm(`Delete “${conversation.title}”?`)) return;
  store(keyOf(conversation));
  for (const [key, value] of Object.entries(unsaved)) store(key, value); // there may be room now
  drop(conversation);
}

function drop(conversation) {
  conversations = conversations.filter((other) => other !== conversation);
  if (conversation === current) show(newConversation());
  else drawHistory();
}

function edit(index, text) {
  if (running) return;
  editing = index;
  drawMessages();
  const area = document.querySelector(".edit textarea");
  if (text) area.value = text;
  area.focus();
  area.setSelectionRange(area.value.length, area.value.length);
}

function editor(message, index) {
  const area = element("textarea", { value: message.text, ariaLabel: "Edit message" });
  const cancel = () => {
    editing = -1;
    drawMessages();
    $("messages").children[index].querySelector(".again").focus();
  };
  const commit = () => {
    if (running || !area.value.trim() || !agreed(index + 2)) return;
    const before = current.messages;
    current.messages = before.slice(0, index);
    ask(area.value.trim(), before);
  };
  area.addEventListener("keydown", (event) => {
    if (event.isComposing) return; // the input method's
    if (event.key === "Escape") cancel();
    if (event.key === "Enter" && !event.shiftKey) {
      event.preventDefault();
      commit();
    }
  });
  const row = element("div", { className: "row" }, button("Cancel", cancel), button("Send", commit, "primary"));
  return element("div", { className: "edit" }, area, row);
}

function ask(text, before) {
  editing = -1;
  if (!conversations.includes(current)) {
    current.started = Date.now();
    conversations.unshift(current);
  }
  current.messages.push({ role: "user", text });
  answer(before);
}

function regenerate(index) {
  if (running || !settled() || !agreed(index + 1)) return;
  editing = -1;
  const before = current.messages;
  current.messages = before.slice(0, index);
  const lost = index + 1 < before.length || before[index].parts.length;
  answer(lost ? before : undefined);
}

// Asks, where there are any, before the messages from number `index` on are lost.
const agreed = (index) =>
  index >= current.messages.length || confirm("The later messages of this conversation will be removed. Continue?");

// The text of the open editor, where it was changed.
function unsent() {
  const text = document.querySelector(".edit textarea")?.value.trim();
  return text !== current.messages[editing]?.text && text;
}

// Asks, where there is any, before such a text is lost.
const settled = () => !unsent() || confirm("The message you are editing was not sent. Discard the change?");

// What the model is shown of an earlier answer: the tool calls in it are part of what it said.
function content(message) {
  if (message.role === "user") return message.text;
  return message.parts.flatMap((part) => {
    if (part.type === "text") return [part];
    const call = { type: "python", text: part.expression };
    return part.result === null ? [call] : [call, { type: "python_output", text: part.result }];
  });
}

// As many of the newest turns as a request holds, from a user's message on; the last message always.
function newest(messages) {
  const size = (value) => JSON.stringify(value).length;
  let from = messages.length - 1;
  let room = SENT - size(messages[from]);
  while (from >= 2 && (room -= size(messages.slice(from - 2, from))) >= 0) from -= 2;
  return messages.slice(from);
}

// With `before`, the messages that the answer takes the place of: they are put back where nothing of it comes, and stay in
// storage until it ends.
async function answer(before) {
  const conversation = current;
  const asked = conversation.messages.length - 1;
  const { text } = conversation.messages[asked];
  const all = conversation.messages
    .filter((message, i, all) => (all[i + 1] ?? message).parts?.length !== 0 && message.parts?.length !== 0)
    .map((message) => ({ role: message.role, content: content(message) }));
  const messages = newest(all);
  const reply = { role: "assistant", parts: [] };
  conversation.messages.push(reply);
  const control = (running = new AbortController());
  drawMessages();
  busy(true);
  focusInput();
  if (!before) save(conversation);
  $("scroller").scrollTop = $("scroller").scrollHeight;
  const started = performance.now();
  let drawn = false;
  const redraw = () => {
    if (drawn) return;
    drawn = true;
    requestAnimationFrame(() => {
      drawn = false;
      if (running === control) redrawLast(); // else it has been drawn as it ended, or another conversation has
    });
  };
  try {
    const body = { messages, stream: true, ...settings };
    for await (const chunk of stream(body, control.signal)) {
      if (chunk.error) throw new Error(chunk.error.message);
      take(chunk, reply, started, all.length - messages.length, body.max_tokens);
      redraw();
    }
  } catch (error) {
    if (control.signal.aborted) reply.note = "Stopped.";
    else if (!leaving) reply.error = error instanceof TypeError ? "The server cannot be reached. Is it still running?" : error.message;
  }
  if (running === control) {
    running = null;
    busy(false);
  }
  const failed = before && !reply.parts.length && !reply.figures;
  if (failed) conversation.messages = before;
  save(conversation);
  if (conversation !== current) return;
  if (!failed) return redrawLast();
  drawMessages();
  const edited = text !== before[asked].text;
  if (edited) edit(asked, text);
  if (reply.error) announce(reply.error, edited ? asked : asked + 1);
}

function take(chunk, reply, started, unsent, limit) {
  $("model").textContent = chunk.model; // the server may have been started again with another one
  const { delta, finish_reason: reason } = chunk.choices[0];
  const left = chunk.truncated_messages + unsent; // a number in the first chunk, which alone has the field
  if (left > 0) reply.left = left;
  if (delta.content) {
    const last = reply.parts.at(-1);
    if (last?.type === "text") last.text += delta.content;
    else reply.parts.push({ type: "text", text: delta.content });
  }
  if (delta.tool) reply.parts.push({ type: "tool", ...delta.tool });
  if (chunk.usage) {
    const tokens = chunk.usage.completion_tokens;
    if (reason === "length" && tokens < limit) reply.note = "The answer filled the model's context.";
    else if (reason === "length") reply.note = "The answer reached its length limit; raise Max tokens to let it go on.";
    else if (!plainText(reply).trim()) reply.note = "The model said nothing.";
    reply.figures = `${tokens} token${tokens === 1 ? "" : "s"}, ${((1000 * tokens) / (performance.now() - started)).toFixed(0)} tok/s`;
  }
}

// The parsed objects of a server-sent event stream. Asks for the token once where the server wants one.
async function* stream(body, signal) {
  const response = await request("/v1/chat/completions", { method: "POST", body: JSON.stringify(body), signal });
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  let ended = false;
  for (;;) {
    const { value, done } = await reader.read();
    if (done) break;
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      if (line === "data: [DONE]") ended = true;
      else if (line.startsWith("data: ")) yield JSON.parse(line.slice(6));
    }
  }
  if (!ended) throw new Error("The connection broke before the answer was complete.");
}

async function request(path, options = {}) {
  for (;;) {
    const headers = { "Content-Type": "application/json" };
    const token = load("token", "");
    if (TOKEN.test(token)) headers.Authorization = "Bearer " + token;
    const response = await fetch(path, { ...options, headers });
    if (response.ok) return response;
    const message = (await response.json().catch(() => null))?.error?.message;
    if (response.status !== 401) throw new Error(message ?? `The server answered ${response.status}.`);
    if (!(await askToken(TOKEN.test(token)))) throw new Error("This server needs its token.");
  }
}

function askToken(again) {
  const dialog = $("token-dialog");
  $("token").value = "";
  $("token-why").textContent = again ? "That was not the one." : "Whoever started it has it. It stays in this browser.";
  dialog.returnValue = "cancel";
  if (!dialog.open) dialog.showModal();
  return new Promise((resolve) => {
    dialog.addEventListener(
      "close",
      () => {
        const given = dialog.returnValue === "ok";
        if (given) store("token", $("token").value);
        resolve(given);
      },
      { once: true },
    );
  });
}

function busy(state) {
  $("messages").setAttribute("aria-busy", String(state));
  for (const node of document.querySelectorAll(".again")) node.disabled = state;
  $("send").textContent = state ? "■" : "↑";
  $("send").setAttribute("aria-label", state ? "Stop" : "Send");
  $("send").title = state ? "Stop (Esc)" : "Send (Enter)";
}

function submit() {
  const text = $("input").value.trim();
  if (running || !text || !settled()) return;
  $("input").value = "";
  grow();
  ask(text);
}

function grow() {
  $("input").style.height = "auto";
  $("input").style.height = $("input").scrollHeight + "px";
}

function setTheme(theme) {
  document.documentElement.dataset.theme = theme;
  $("theme").textContent = `Theme: ${theme}`;
}

// ---- start ---------------------------------------------------------------------------------------------------------

function connect() {
  $("composer").addEventListener("submit", (event) => {
    event.preventDefault();
    if (running) running.abort();
    else submit();
  });
  $("input").addEventListener("input", grow);
  $("input").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      submit();
    }
  });
  document.addEventListener("keydown", (event) => {
    if (event.isComposing) return;
    if (event.key === "Escape" && document.body.classList.contains("menu-open")) {
      menu(false);
      $("menu").focus();
    } else if (event.key === "Escape" && running && !$("token-dialog").open) running.abort();
    if (event.ctrlKey && event.shiftKey && event.key.toLowerCase() === "o") {
      event.preventDefault();
      show(newConversation());
    }
  });
  window.addEventListener("storage", follow);
  window.addEventListener("beforeunload", (event) => {
    if ($("input").value.trim() || unsent()) event.preventDefault(); // the browser asks
  });
  window.addEventListener("pagehide", () => {
    leaving = true;
    if (running && current.messages.at(-1).parts.length) save(current);
  });
  window.addEventListener("pageshow", () => (leaving = false));
  $("token-cancel").addEventListener("click", () => $("token-dialog").close("cancel"));
  $("new-chat").addEventListener("click", () => show(newConversation()));
  $("menu").addEventListener("click", () => {
    menu(true);
    $("new-chat").focus();
  });
  $("shade").addEventListener("click", () => menu(false));
  $("tune").addEventListener("click", () => {
    $("settings").hidden = !$("settings").hidden;
    $("tune").setAttribute("aria-expanded", String(!$("settings").hidden));
  });
  $("settings").addEventListener("submit", (event) => event.preventDefault());
  $("theme").addEventListener("click", () => {
    const themes = ["auto", "light", "dark"];
    const next = themes[(themes.indexOf(load("theme", "auto")) + 1) % themes.length];
    store("theme", next);
    setTheme(next);
  });
  $("suggestions").append(...SUGGESTIONS.map((text) => button(text, () => !running && ask(text))));
}

function connectSettings() {
  for (const name of Object.keys(SETTINGS)) {
    const draw = () => ($(name + "-value").value = $(name).value);
    $(name).value = settings[name];
    settings[name] = Number($(name).value); // the slider holds it to its range
    $(name).addEventListener("input", () => {
      settings[name] = Number($(name).value);
      store("settings", settings);
      draw();
    });
    draw();
  }
}

setTheme(load("theme", "auto"));
connect();
connectSettings();
drawMessages();
loadConversations();
