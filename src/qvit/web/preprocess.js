// From pixels to a model's input, as qvit.runtime.preprocess does it with Pillow: the same integers to the last one.

const PRECISION = 22; // bits of a filter's weights behind the point, as Pillow has it for 8-bit pixels

const sinc = (x) => (x === 0 ? 1 : Math.sin(x * Math.PI) / (x * Math.PI));

/** Pillow's filters: how far they reach, and their value x pixels away. */
const FILTERS = {
  box: [0.5, (x) => (x > -0.5 && x <= 0.5 ? 1 : 0)],
  bilinear: [1, (x) => Math.max(0, 1 - Math.abs(x))],
  hamming: [1, (x) => (Math.abs(x) >= 1 ? 0 : sinc(x) * (0.54 + 0.46 * Math.cos(x * Math.PI)))],
  bicubic: [
    2,
    (x) => {
      const a = -0.5;
      const far = Math.abs(x);
      if (far < 1) return ((a + 2) * far - (a + 3)) * far * far + 1;
      return far < 2 ? (((far - 5) * far + 8) * far - 4) * a : 0;
    },
  ],
  lanczos: [3, (x) => (x >= -3 && x < 3 ? sinc(x) * sinc(x / 3) : 0)],
};

/** Round half to even, as Python does. */
function roundEven(x) {
  const floor = Math.floor(x);
  if (x - floor !== 0.5) return Math.round(x);
  return floor % 2 === 0 ? floor : floor + 1;
}

/** Width and height after resizing, before the crop. */
function resizedSize(width, height, cropWidth, cropHeight, { crop_pct, crop_mode }) {
  const target = [Math.floor(cropWidth / crop_pct), Math.floor(cropHeight / crop_pct)];
  if (crop_mode === "squash") return target;
  if (crop_mode === "center" && target[0] === target[1]) {
    const longer = Math.trunc((target[0] * Math.max(width, height)) / Math.min(width, height));
    return width <= height ? [target[0], longer] : [longer, target[0]];
  }
  const ratios = [width / target[0], height / target[1]];
  const ratio = crop_mode === "border" ? Math.max(...ratios) : Math.min(...ratios);
  return [Math.max(1, roundEven(width / ratio)), Math.max(1, roundEven(height / ratio))];
}

/** Where the crop of an axis starts; below 0 where it is to be filled. */
const offsetOf = (length, crop) =>
  crop > length ? -Math.floor((crop - length) / 2) : roundEven((length - crop) / 2);

/**
 * How the pixels [first, last) of an axis of `length`, resized to `size`, are made: from which pixel on they look at
 * which weights. Weights are `reach` apart.
 */
function axisWeights(length, size, first, last, interpolation) {
  const count = last - first;
  const scale = length / size;
  const [radius, filter] = FILTERS[interpolation] ?? [0, null];
  const stretch = Math.max(scale, 1);
  const support = radius * stretch;
  const reach = Math.ceil(support) * 2 + 1;
  const axis = { count, reach, from: new Int32Array(count), until: new Int32Array(count) };
  axis.weights = new Int32Array(count * reach);
  if (filter === null) {
    // Nearest: places are added up, as Pillow adds them up.
    let at = scale * 0.5;
    for (let i = 0; i < last; ++i, at += scale) {
      if (i < first) continue;
      axis.from[i - first] = Math.floor(at);
      axis.until[i - first] = Math.floor(at) + 1;
      axis.weights[(i - first) * reach] = 1 << PRECISION;
    }
    return axis;
  }
  for (let i = 0; i < count; ++i) {
    const center = (first + i + 0.5) * scale;
    const from = Math.max(0, Math.trunc(center - support + 0.5));
    const until = Math.min(length, Math.trunc(center + support + 0.5));
    const weights = Float64Array.from({ length: until - from }, (_, x) => filter((x + from - center + 0.5) / stretch));
    const sum = weights.reduce((total, weight) => total + weight, 0);
    weights.forEach((weight, x) => {
      const share = (sum === 0 ? weight : weight / sum) * (1 << PRECISION);
      axis.weights[i * reach + x] = Math.trunc(share < 0 ? share - 0.5 : share + 0.5);
    });
    axis.from[i] = from;
    axis.until[i] = until;
  }
  return axis;
}

const HALF = 1 << (PRECISION - 1);
const clipped = (sum) => Math.min(255, Math.max(0, sum >> PRECISION));

/** Some rows of one channel, whose values are `step` apart in `data`, with as many columns as the axis has places. */
function resizeAcross(data, start, step, width, rows, axis) {
  const { count, reach, from, until, weights } = axis;
  const out = new Uint8Array(rows * count);
  for (let row = 0; row < rows; ++row) {
    for (let place = 0; place < count; ++place) {
      let sum = HALF;
      let at = start + (row * width + from[place]) * step;
      const end = place * reach + until[place] - from[place];
      for (let k = place * reach; k < end; ++k, at += step) sum += data[at] * weights[k];
      out[row * count + place] = clipped(sum);
    }
  }
  return out;
}

/** The rows of a plane of `columns` made into as many as the axis has places, `stride` apart in `out`. */
function resizeDown(plane, firstRow, columns, axis, out, stride) {
  const sums = new Int32Array(columns);
  for (let place = 0; place < axis.count; ++place) {
    sums.fill(HALF);
    for (let row = axis.from[place]; row < axis.until[place]; ++row) {
      const weight = axis.weights[place * axis.reach + row - axis.from[place]];
      const at = (row - firstRow) * columns;
      for (let x = 0; x < columns; ++x) sums[x] += plane[at + x] * weight;
    }
    for (let x = 0; x < columns; ++x) out[place * stride + x] = clipped(sums[x]);
  }
}

/** Rows of RGBA pixels whose transparent ones lie over white; the pixels themselves where there are none. */
function opaque(data) {
  let i = 3;
  while (i < data.length && data[i] === 255) i += 4;
  if (i >= data.length) return data;
  const out = new Uint8Array(data.length);
  for (let at = 0; at < data.length; ++at) {
    const alpha = data[at | 3];
    const sum = (data[at] * alpha + 255 * (255 - alpha)) * 128 + 128 * 128;
    out[at] = ((sum >> 8) + sum) >> 15;
  }
  return out;
}

/** RGBA pixels as grey ones. */
function grey(data) {
  const out = new Uint8Array(data.length / 4);
  for (let i = 0, at = 0; i < out.length; ++i, at += 4)
    out[i] = (data[at] * 19595 + data[at + 1] * 38470 + data[at + 2] * 7471 + 0x8000) >> 16;
  return out;
}

/**
 * An image resized, then cut or filled around its middle: one Uint8Array (height x width) per channel.
 * @param {{data: Uint8ClampedArray | Uint8Array, width: number, height: number}} image RGBA
 */
export function fit(image, preprocessing) {
  const [channels, cropHeight, cropWidth] = preprocessing.input_size;
  const [width, height] = resizedSize(image.width, image.height, cropWidth, cropHeight, preprocessing);
  const left = offsetOf(width, cropWidth);
  const top = offsetOf(height, cropHeight);
  // What of the resized image lies inside of the crop, and of which rows it is made.
  const [x, right] = [Math.max(left, 0), Math.min(left + cropWidth, width)];
  const [y, bottom] = [Math.max(top, 0), Math.min(top + cropHeight, height)];
  const across = axisWeights(image.width, width, x, right, preprocessing.interpolation);
  const down = axisWeights(image.height, height, y, bottom, preprocessing.interpolation);
  const firstRow = Math.min(...down.from);
  const rows = Math.max(...down.until) - firstRow;
  const pixels = opaque(image.data.subarray(firstRow * image.width * 4, (firstRow + rows) * image.width * 4));
  const [data, step] = channels === 1 ? [grey(pixels), 1] : [pixels, 4];
  return Array.from({ length: channels }, (_, channel) => {
    const narrow = resizeAcross(data, channel, step, image.width, rows, across);
    const mean = Math.min(Math.max(preprocessing.mean[channel], 0), 1);
    const out = new Uint8Array(cropHeight * cropWidth);
    if (preprocessing.crop_mode === "border") out.fill(roundEven(255 * mean));
    resizeDown(narrow, firstRow, across.count, down, out.subarray((y - top) * cropWidth + x - left), cropWidth);
    return out;
  });
}

/**
 * An image as a model takes it: float32 (channels, height, width).
 * @param {{data: Uint8ClampedArray | Uint8Array, width: number, height: number}} image RGBA
 */
export function preprocess(image, preprocessing) {
  const planes = fit(image, preprocessing);
  const pixels = planes[0].length;
  const values = new Float32Array(planes.length * pixels);
  planes.forEach((plane, channel) => {
    const mean = Math.fround(preprocessing.mean[channel]);
    const std = Math.fround(preprocessing.std[channel]);
    const table = Float32Array.from({ length: 256 }, (_, value) =>
      Math.fround(Math.fround(Math.fround(value / 255) - mean) / std));
    plane.forEach((value, i) => { values[channel * pixels + i] = table[value]; });
  });
  return values;
}
