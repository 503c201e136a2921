// Pictures on canvases: an image, its grain over it, and its code map as a mosaic.

const COARSEST = [64, 110, 190], BETWEEN = [20, 140, 110], FINEST = [205, 30, 95], HOLE = 'rgb(70 70 78 / 80%)';

function colour(segment, count) {
  const place = count === 1 ? 0 : 2 * segment / (count - 1);
  const [from, to] = place < 1 ? [COARSEST, BETWEEN] : [BETWEEN, FINEST];
  return from.map((value, i) => Math.round(value + (to[i] - value) * (place < 1 ? place : place - 1)));
}

/** Draw a bitmap on a canvas; with codes, and if wanted, the cells of its grain over it. */
export function paint(canvas, image, codes, showGrain) {
  const scale = showGrain && codes ? Math.max(1, Math.round(512 / image.width)) : 1;
  canvas.width = image.width * scale;
  canvas.height = image.height * scale;
  canvas.classList.toggle('small', canvas.width < 256);
  const context = canvas.getContext('2d');
  context.imageSmoothingEnabled = false;
  context.drawImage(image, 0, 0, canvas.width, canvas.height);
  if (!showGrain || !codes) return;
  const { sides } = codes.layout, [grain] = codes.grain, size = canvas.width / sides[0];
  grain.forEach((row, y) => row.forEach((segment, x) => {
    const left = x * size, top = y * size;
    if (segment < 0) {
      context.fillStyle = HOLE;
      context.fillRect(left, top, size, size);
      return;
    }
    const rgb = colour(segment, sides.length).join(' '), cells = sides[segment] / sides[0], cell = size / cells;
    context.fillStyle = `rgb(${rgb} / ${segment ? 20 : 0}%)`;
    context.fillRect(left, top, size, size);
    context.strokeStyle = `rgb(${rgb} / 75%)`;
    context.lineWidth = Math.max(1, scale / 5);
    for (let j = 0; j < cells; j++) {
      for (let i = 0; i < cells; i++) context.strokeRect(left + i * cell + .5, top + j * cell + .5, cell - 1, cell - 1);
    }
  }));
}

/** The code map: each code a colour of its own, each cell as large as it is coded. */
export function mosaic(canvas, codes) {
  const { sides, codebook_size: count } = codes.layout, [map] = codes.codes, [grain] = codes.grain;
  const side = sides.at(-1), cell = Math.max(8, Math.floor(512 / side)), block = side / sides[0];
  canvas.width = canvas.height = side * cell;
  const context = canvas.getContext('2d');
  map.forEach((row, y) => row.forEach((code, x) => {
    const segment = grain[Math.floor(y / block)][Math.floor(x / block)];
    if (code < 0) return;
    const step = side / sides[segment];
    if (y % step || x % step) return;
    context.fillStyle = `hsl(${(code * 137.508) % 360} ${45 + 30 * (code % 7) / 6}% ${38 + 34 * code / count}%)`;
    context.beginPath();
    context.roundRect(x * cell + 1, y * cell + 1, step * cell - 2, step * cell - 2, cell / 5);
    context.fill();
  }));
}
