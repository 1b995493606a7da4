// The chat page: it sends the conversation to /v1/chat/completions and shows the answer while it arrives.
"use strict";

const get = (id) => document.getElementById(id);
const [chat, form, prompt, send, stop, status, model] = ["chat", "form", "prompt", "send", "stop", "status", "model"].map(get);

const DRAW_EVERY = 50; // milliseconds

let messages = [];
let running = null; // the AbortController of the answer that arrives

function headers() {
  const key = get("key").value;
  return { "Content-Type": "application/json", ...(key && { Authorization: `Bearer ${key}` }) };
}

async function problem(response) {
  if (response.status === 401) get("key-label").hidden = false;
  const body = await response.json().catch(() => null);
  return new Error(body?.error?.message ?? `the server answered with status ${response.status}`);
}

async function listModels() {
  const response = await fetch("v1/models", { headers: headers() });
  if (!response.ok) throw await problem(response);
  const { data } = await response.json();
  model.replaceChildren(...data.filter((entry) => entry.generates !== false).map((entry) => new Option(entry.id)));
  status.textContent = "";
}

function show(role, text) {
  const element = document.createElement("div");
  element.className = `message ${role}`;
  element.textContent = text;
  chat.append(element);
  element.scrollIntoView({ block: "end" });
  return element;
}

// Yields the data of the server-sent events of a response.
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const parts = (text + value).split("\n\n");
    text = parts.pop();
    for (const part of parts) {
      const data = part.split("\n").find((line) => line.startsWith("data: "))?.slice(6);
      if (data && data !== "[DONE]") yield JSON.parse(data);
    }
  }
}

async function answer() {
  const body = { model: model.value, messages, temperature: Number(get("temperature").value), stream: true };
  body.stream_options = { include_usage: true };
  const start = performance.now();
  const response = await fetch("v1/chat/completions", {
    method: "POST", headers: headers(), body: JSON.stringify(body), signal: running.signal,
  });
  if (!response.ok) throw await problem(response);
  let first = 0, pieces = 0, text = "", drawing = null;
  const parts = { reasoning: { element: null, fresh: "" }, assistant: { element: null, fresh: "" } };
  // Drawing for each token would leave the browser no time for clicks.
  const draw = () => {
    drawing = null;
    for (const [role, part] of Object.entries(parts)) {
      if (!part.fresh) continue;
      part.element ??= show(role, "");
      part.element.append(part.fresh);
      part.fresh = "";
    }
    const seconds = (performance.now() - first) / 1000;
    const speed = pieces > 1 && seconds > 0 ? `, ${((pieces - 1) / seconds).toFixed(1)} tokens/s` : "";
    status.textContent = `${pieces} tokens${speed}, first after ${((first - start) / 1000).toFixed(2)} s`;
    if (chat.scrollHeight - chat.scrollTop - chat.clientHeight < 200) chat.scrollTop = chat.scrollHeight;
  };
  try {
    for await (const event of events(response)) {
      if (event.error) throw new Error(event.error.message);
      const delta = event.choices[0]?.delta ?? {};
      text += delta.content ?? "";
      parts.assistant.fresh += delta.content ?? "";
      parts.reasoning.fresh += delta.reasoning_content ?? "";
      if (delta.content || delta.reasoning_content) {
        first ||= performance.now();
        pieces += 1;
        drawing ??= setTimeout(draw, DRAW_EVERY);
      }
      if (event.usage) pieces = event.usage.completion_tokens;
    }
  } finally {
    clearTimeout(drawing);
    if (first) draw();
    if (text) messages.push({ role: "assistant", content: text });
  }
}

form.addEventListener("submit", async (event) => {
  event.preventDefault();
  const text = prompt.value.trim();
  if (!text || running) return;
  prompt.value = "";
  messages.push({ role: "user", content: text });
  show("user", text);
  running = new AbortController();
  [send.hidden, stop.hidden] = [true, false];
  status.textContent = "waiting for the first token";
  try {
    if (!model.value) await listModels();
    await answer();
  } catch (error) {
    if (error.name === "AbortError") status.textContent += ", stopped";
    else show("error", error.message);
  } finally {
    running = null;
    [send.hidden, stop.hidden] = [false, true];
    document.body.dataset.answers = String(Number(document.body.dataset.answers ?? 0) + 1);
  }
});

prompt.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    form.requestSubmit();
  }
});

stop.addEventListener("click", () => running?.abort());

get("new").addEventListener("click", () => {
  running?.abort();
  messages = [];
  chat.replaceChildren();
  status.textContent = "";
});

get("key").addEventListener("change", () => listModels().catch((error) => { status.textContent = error.message; }));

listModels().catch((error) => { status.textContent = error.message; });
