// Every page: theme, keyboard, actions, and bringing what is shown up to date.

const csrfToken = document.querySelector('meta[name="csrf-token"]').content;

// ---- theme ----------------------------------------------------------------------------------------------------

const THEMES = ["auto", "light", "dark"];
const themeButton = document.getElementById("theme");

function theme() {
  return document.documentElement.dataset.theme ?? "auto";
}

function showTheme() {
  themeButton.textContent = `Theme: ${theme()}`;
  document.dispatchEvent(new Event("themed"));
}

themeButton.addEventListener("click", () => {
  const next = THEMES[(THEMES.indexOf(theme()) + 1) % THEMES.length];
  if (next === "auto") {
    localStorage.removeItem("nanofleet-theme");
    delete document.documentElement.dataset.theme;
  } else {
    localStorage.setItem("nanofleet-theme", next);
    document.documentElement.dataset.theme = next;
  }
  showTheme();
});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", showTheme);
showTheme();

// ---- keyboard -------------------------------------------------------------------------------------------------

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const isTyping = event.target.matches("input, select, textarea");
  if (event.key === "/" && !isTyping) {
    const search = document.getElementById("search");
    if (search) {
      event.preventDefault();
      search.focus();
      search.select();
    } else if (document.querySelector('a[href="/devices"]')) {
      location.assign("/devices#search");
    }
  }
  if (!isTyping && (event.key === "ArrowDown" || event.key === "ArrowUp")) moveBetweenRows(event);
});
if (location.hash === "#search") document.getElementById("search")?.focus();

/** Moves the focus from the link of one row of a table to that of its neighbour. */
function moveBetweenRows(event) {
  const row = document.activeElement.closest?.("[data-rows] tbody tr");
  if (!row) return;
  const rows = [...row.closest("table").querySelectorAll("tbody tr")].filter((each) => each.querySelector("a, summary"));
  const next = rows[rows.indexOf(row) + (event.key === "ArrowDown" ? 1 : -1)];
  if (!next) return;
  event.preventDefault();
  next.querySelector("a, summary").focus();
}

// ---- up to date -----------------------------------------------------------------------------------------------

const topics = document.body.dataset.live.split(" ").filter(Boolean);
const live = document.getElementById("live");
// Chosen: a page that changes more often than that cannot be read.
const REFRESH_MS = 2000;
const RETRY_MS = 15000;
let stream = null;
let told = null;
let refreshTimer = null;
let lastRefreshMs = 0;

function showLive(state, words) {
  if (live.dataset.state === state) return;
  live.dataset.state = state;
  live.querySelector(".words").textContent = words;
}

function connect() {
  if (stream || topics.length === 0 || document.hidden || !document.getElementById("ended").hidden) return;
  stream = new EventSource("/dashboard/events");
  stream.addEventListener("changed", (event) => {
    showLive("on", "Live");
    const numbers = JSON.parse(event.data);
    const isNew = told !== null && topics.some((topic) => numbers[topic] !== told[topic]);
    told = numbers;
    if (isNew) refreshSoon();
  });
  stream.addEventListener("ended", (event) => end(event.data));
  stream.addEventListener("error", () => {
    showLive("lost", "Reconnecting…");
    // A browser tries again by itself unless it was refused; then the session may be over.
    if (stream?.readyState === EventSource.CLOSED) {
      disconnect();
      refresh().catch(() => {});
      setTimeout(connect, RETRY_MS);
    }
  });
}

function disconnect() {
  stream?.close();
  stream = null;
}

function end(reason) {
  disconnect();
  showLive("off", "Not live");
  const notice = document.getElementById("ended");
  const link = document.createElement("a");
  link.href = `/sign-in?next=${encodeURIComponent(location.pathname + location.search)}`;
  link.textContent = "Sign in again";
  notice.replaceChildren(`Your session is over (${reason}). What you see stays as it was. `, link);
  notice.hidden = false;
}

// A tab that nobody sees holds no connection: a browser has only six to one host.
document.addEventListener("visibilitychange", () => (document.hidden ? disconnect() : connect()));
addEventListener("pagehide", disconnect);
addEventListener("pageshow", connect);

function refreshSoon() {
  if (refreshTimer !== null) return;
  const waitMs = Math.max(0, lastRefreshMs + REFRESH_MS - Date.now());
  refreshTimer = setTimeout(() => {
    refreshTimer = null;
    refresh().catch(() => showLive("lost", "Reconnecting…"));
  }, waitMs);
}

/** Asks for this page again and puts in place the parts that are not as they were. */
async function refresh() {
  lastRefreshMs = Date.now();
  const answer = await fetch(location.href, { redirect: "manual" });
  if (answer.type === "opaqueredirect") return end("it ended or was signed out");
  if (!answer.ok) return;
  const fresh = new DOMParser().parseFromString(await answer.text(), "text/html");
  for (const part of document.querySelectorAll("[data-part]")) {
    const next = fresh.getElementById(part.id);
    if (next && next.innerHTML !== part.innerHTML) replacePart(part, next);
  }
  document.dispatchEvent(new Event("refreshed"));
}

/** Puts new content into a part; the focus and the place it was scrolled to stay. */
function replacePart(part, next) {
  const key = part.contains(document.activeElement) ? document.activeElement.dataset.key : undefined;
  const places = [...part.querySelectorAll(".scroll")].map((each) => each.scrollLeft);
  part.replaceChildren(...next.childNodes);
  part.querySelectorAll(".scroll").forEach((each, index) => (each.scrollLeft = places[index] ?? 0));
  if (key !== undefined) part.querySelector(`[data-key="${CSS.escape(key)}"]`)?.focus({ preventScroll: true });
}

connect();

// ---- actions --------------------------------------------------------------------------------------------------

const ACTIONS = {
  ban: {
    title: (button) => `Ban ${button.dataset.agent}?`,
    text: "Its session ends at once and none of its keys count until the ban is lifted.",
    needsReason: true,
    request: (button, reason) => ["POST", `/api/agents/${button.dataset.agent}/ban`, { reason }],
  },
  unban: {
    title: (button) => `Lift the ban of ${button.dataset.agent}?`,
    text: "Its last key counts again. Whoever holds that key can come back.",
    request: (button) => ["DELETE", `/api/agents/${button.dataset.agent}/ban`],
  },
  transfer: {
    title: (button) => `Let ${button.dataset.agent} fetch ${button.dataset.model}?`,
    text: "Whole chunks go over its metered link, which may cost money.",
    request: (button) => ["POST", `/api/agents/${button.dataset.agent}/transfers`, { model: button.dataset.model }],
  },
};

const dialog = document.getElementById("confirm");
let chosen = null;

document.addEventListener("click", (event) => {
  const button = event.target.closest("[data-action]");
  if (!button || button.disabled) return;
  chosen = button;
  const action = ACTIONS[button.dataset.action];
  document.getElementById("confirm-title").textContent = action.title(button);
  document.getElementById("confirm-text").textContent = action.text;
  document.getElementById("confirm-error").textContent = "";
  const reason = document.getElementById("confirm-reason");
  reason.hidden = !action.needsReason;
  reason.querySelector("input").required = Boolean(action.needsReason);
  dialog.showModal();
});

dialog?.querySelector('[value="cancel"]').addEventListener("click", (event) => {
  event.preventDefault();
  dialog.close();
});

dialog?.querySelector("form").addEventListener("submit", async (event) => {
  event.preventDefault();
  const go = document.getElementById("confirm-go");
  const error = document.getElementById("confirm-error");
  go.disabled = true;
  try {
    const reason = dialog.querySelector("[name=reason]").value;
    await act(...ACTIONS[chosen.dataset.action].request(chosen, reason));
    dialog.close();
    await refresh();
  } catch (problem) {
    error.textContent = problem.message;
  } finally {
    go.disabled = false;
  }
});

async function act(method, path, body) {
  const headers = { "x-csrf-token": csrfToken };
  if (body !== undefined) headers["content-type"] = "application/json";
  const answer = await fetch(path, { method, headers, body: body && JSON.stringify(body) });
  if (answer.ok) return;
  const problem = await answer.json().catch(() => ({}));
  throw new Error(problem.detail ?? `It was refused with ${answer.status}; load the page again.`);
}
