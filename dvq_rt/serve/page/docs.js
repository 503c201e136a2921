// The OpenAPI document as a page.

const page = document.getElementById('doc');

function element(name, text, ...children) {
  const made = document.createElement(name);
  if (text) made.textContent = text;
  made.append(...children);
  return made;
}

function kind(schema) {
  const one = (part) => part.enum?.join(' | ') ?? part.const ?? (part.type === 'array' ? `list of ${part.items?.type ?? 'values'}` : part.type);
  return [...new Set((schema.anyOf ?? [schema]).map(one))].filter((word) => word && word !== 'null').join(' or ');
}

function rows(fields) {
  return fields.flatMap(([name, schema, words]) => [element('dt', name), element('dd', [kind(schema), words].filter(Boolean).join(': '))]);
}

const { paths } = await (await fetch('/openapi.json')).json();
const rooms = new Map();
for (const [path, methods] of Object.entries(paths)) {
  for (const [method, operation] of Object.entries(methods)) {
    const article = element('article', '', element('h3', '', element('span', method.toUpperCase()), path));
    for (const text of operation.description.split('\n\n')) article.append(element('p', text));
    const fields = (operation.parameters ?? []).map((one) => [one.name, one.schema, one.description]);
    for (const [type, { schema }] of Object.entries(operation.requestBody?.content ?? {})) {
      article.append(element('p', `Body: ${[type, operation.requestBody.description].filter(Boolean).join(', ')}`));
      fields.push(...Object.entries(schema.properties ?? {}).map(([name, part]) => [name, part, part.description]));
    }
    if (fields.length) article.append(element('dl', '', ...rows(fields)));
    const [room] = operation.tags;
    rooms.set(room, [...(rooms.get(room) ?? []), article]);
  }
}
for (const [room, articles] of rooms) page.append(element('h2', room[0].toUpperCase() + room.slice(1)), ...articles);
