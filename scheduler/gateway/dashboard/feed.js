// The server's live feed, read with fetch because EventSource cannot send an API key.

const KEY_ITEM = "glowplug-key";
const RETRY_MS = 1500;

export function readKey() { return sessionStorage.getItem(KEY_ITEM) ?? ""; }
export function writeKey(key) { sessionStorage.setItem(KEY_ITEM, key); }

export function authorised(headers = {}) {
  const key = readKey();
  return key ? { ...headers, Authorization: `Bearer ${key}` } : headers;
}

/** Events of a server-sent stream as {data} or {comment}, in order. Source: WHATWG HTML, server-sent events. */
export async function* readEvents(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let buffered = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    buffered += value;
    let end;
    while ((end = buffered.indexOf("\n\n")) >= 0) {
      const lines = buffered.slice(0, end).split("\n");
      buffered = buffered.slice(end + 2);
      const data = lines.filter((line) => line.startsWith("data: ")).map((line) => line.slice(6)).join("\n");
      if (data) yield { data };
      else if (lines[0]?.startsWith(":")) yield { comment: lines[0].slice(1).trim() };
    }
  }
}

/** What a refusal says, whatever its form. */
export async function describeRefusal(response) {
  try {
    return (await response.json()).error.message;
  } catch {
    return `${response.status} ${response.statusText}`;
  }
}

/** Follow the feed for ever: `onDocument(document)`, `onState(state, text)` with live, lost or locked. */
export async function follow(onDocument, onState) {
  for (;;) {
    try {
      const response = await fetch("/admin/live", { headers: authorised() });
      if (response.status === 401 || response.status === 403) {
        onState("locked", await describeRefusal(response));
        return;
      }
      if (!response.ok) throw new Error(await describeRefusal(response));
      for await (const event of readEvents(response)) {
        if (!event.data) continue;
        const found = JSON.parse(event.data);
        if (found.error) onState("lost", found.error.message);
        else { onState("live", "live"); onDocument(found); }
      }
      onState("lost", "the server ended the feed; connecting again");
    } catch (error) {
      onState("lost", `no connection (${error.message}); trying again`);
    }
    await new Promise((resume) => setTimeout(resume, RETRY_MS));
  }
}
