// The audit page: reads the log from GET /api/audit, page by page.

const place = document.getElementById("audit");
const more = document.getElementById("more");
let body = null;
let next = null;

function show(title, text) {
  const box = document.createElement("div");
  box.className = "empty";
  const heading = document.createElement("p");
  heading.className = "title";
  heading.textContent = title;
  const words = document.createElement("p");
  words.textContent = text;
  box.append(heading, words);
  place.replaceChildren(box);
}

function rowOf(entry) {
  const row = document.createElement("tr");
  const when = document.createElement("time");
  when.dateTime = entry.at;
  when.textContent = entry.at.replace("T", " ").slice(0, 19);
  const cells = [when, `${entry.operator} (${entry.role})`, entry.action, entry.target, outcomeOf(entry)];
  for (const content of cells) {
    const cell = document.createElement("td");
    cell.append(content ?? "–");
    row.append(cell);
  }
  row.firstChild.className = "number-text";
  if (entry.detail) {
    const detail = document.createElement("div");
    detail.className = "muted";
    detail.textContent = typeof entry.detail === "string" ? entry.detail : JSON.stringify(entry.detail);
    row.lastChild.append(detail);
  }
  return row;
}

function outcomeOf(entry) {
  const word = document.createElement("span");
  word.className = `state ${{ ok: "ok", failed: "bad" }[entry.outcome] ?? "warn"}`;
  word.textContent = entry.code ? `${entry.outcome}: ${entry.code}` : entry.outcome;
  return word;
}

async function reasonOf(answer) {
  const problem = await answer.json().catch(() => ({}));
  return problem.detail ?? "Ask an admin for a credential with the role operator.";
}

async function read() {
  const words = new URLSearchParams({ limit: "50" });
  if (next !== null) words.set("before", next);
  const answer = await fetch(`/api/audit?${words}`);
  if (answer.status === 404) {
    return show("This controller keeps no audit log", "Update the controller; until then its own log says which operator asked for which change.");
  }
  if (answer.status === 403) return show("Your role may not read this", await reasonOf(answer));
  if (answer.status === 401) return show("Your session is over", "Load this page again to sign in.");
  if (!answer.ok) return show("The log could not be read", `It was refused with ${answer.status}. Load the page again; if it stays so, see the controller's log.`);
  const log = await answer.json();
  if (log.entries.length === 0 && body === null) return show("Nothing was changed yet", "Whatever an operator changes is listed here, with what came of it.");
  if (body === null) {
    place.replaceChildren(document.getElementById("audit-table").content.cloneNode(true));
    body = place.querySelector("tbody");
  }
  body.append(...log.entries.map(rowOf));
  next = log.next;
  more.hidden = next === null;
}

function readOrSay() {
  read().catch(() => show("The controller does not answer", "Check that it runs and that this machine reaches it, then load the page again."));
}

more.addEventListener("click", readOrSay);
readOrSay();
