// Calls to the server: the key, errors as sentences, and server-sent events.

const STORED = 'dvq-rt key';

export class Refused extends Error {}

function headers(more = {}) {
  const key = sessionStorage.getItem(STORED);
  return key ? { ...more, Authorization: `Bearer ${key}` } : more;
}

async function askForKey() {
  const dialog = document.getElementById('key-dialog');
  dialog.showModal();
  await new Promise((done) => dialog.addEventListener('close', done, { once: true }));
  const field = document.getElementById('key');
  sessionStorage.setItem(STORED, field.value);
  const given = field.value !== '';
  field.value = '';
  return given;
}

/** A successful response; asks for the key where the server wants one. Throws Refused with the server's sentence. */
export async function call(path, options = {}) {
  const response = await fetch(path, { ...options, headers: headers(options.headers) });
  if (response.ok) return response;
  if (response.status === 401 && await askForKey()) return call(path, options);
  const answer = await response.json().catch(() => null);
  throw new Refused(answer?.error?.message ?? `The server answered with status ${response.status}.`);
}

export function json(value, signal) {
  return { method: 'POST', body: JSON.stringify(value), headers: { 'Content-Type': 'application/json' }, signal };
}

/** The data of each event of a response, as objects. */
export async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = '';
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const blocks = (rest + value).split('\n\n');
    rest = blocks.pop();
    for (const block of blocks) {
      const data = block.split('\n').find((line) => line.startsWith('data: '));
      if (!data) continue;
      const event = JSON.parse(data.slice(6));
      if (event.type === 'error') throw new Refused(event.error.message);
      yield event;
    }
  }
}

export function png(base64) {
  return new Blob([Uint8Array.from(atob(base64), (letter) => letter.charCodeAt(0))], { type: 'image/png' });
}

export function bitmap(base64) {
  return createImageBitmap(png(base64));
}

export function download(name, blob) {
  const link = document.createElement('a');
  link.href = URL.createObjectURL(blob);
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}
