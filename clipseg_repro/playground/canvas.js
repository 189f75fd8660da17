// A picture to draw boxes and brush strokes on, for widgets.Canvas. Marks are in pixels of the whole picture.

const COLOUR = "#0072B2"; // of the first row of words, which the example goes with

function render({ model, el }) {
  const canvas = document.createElement("canvas");
  canvas.style.cssText = "max-width: 100%; cursor: crosshair; touch-action: none";
  el.append(canvas);
  const context = canvas.getContext("2d");
  const picture = new Image();
  let mark = null; // the one that is being drawn

  const paint = () => {
    context.drawImage(picture, 0, 0);
    const scale = canvas.width / model.get("size")[0];
    const layer = new OffscreenCanvas(canvas.width, canvas.height); // marks that overlap are one mask, tinted once
    const marks = layer.getContext("2d");
    marks.scale(scale, scale);
    marks.fillStyle = marks.strokeStyle = COLOUR;
    marks.lineCap = marks.lineJoin = "round";
    for (const { tool, points, width } of mark ? [...model.get("drawn"), mark] : model.get("drawn")) {
      const [[left, top], [right, bottom]] = [points[0], points[points.length - 1]];
      if (tool === "box") {
        marks.fillRect(left, top, right - left, bottom - top);
        continue;
      }
      marks.lineWidth = width;
      marks.beginPath();
      marks.moveTo(left, top);
      for (const [x, y] of points) marks.lineTo(x, y);
      marks.stroke();
    }
    context.globalAlpha = 0.6;
    context.drawImage(layer, 0, 0);
    context.globalAlpha = 1;
  };

  const show = () => { picture.src = model.get("picture"); };
  picture.onload = () => {
    canvas.width = picture.naturalWidth;
    canvas.height = picture.naturalHeight;
    paint();
  };

  const place = (event) => {
    const seen = canvas.getBoundingClientRect();
    const shares = [(event.clientX - seen.left) / seen.width, (event.clientY - seen.top) / seen.height];
    return shares.map((share, i) => Math.round(Math.min(1, Math.max(0, share)) * (model.get("size")[i] - 1)));
  };
  canvas.onpointerdown = (event) => {
    canvas.setPointerCapture(event.pointerId);
    const start = place(event);
    mark = { tool: model.get("tool"), points: [start, start] };
    if (mark.tool === "brush") mark.width = Math.ceil(Math.min(...model.get("size")) / 20);
    paint();
  };
  canvas.onpointermove = (event) => {
    if (!mark) return;
    const [x, y] = place(event);
    const [lastX, lastY] = mark.points[mark.points.length - 1];
    if (mark.tool === "box") mark.points[1] = [x, y];
    else if (Math.hypot(x - lastX, y - lastY) > mark.width / 4) mark.points.push([x, y]); // a short way says as much
    paint();
  };
  canvas.onpointerup = canvas.onpointercancel = () => {
    const [[left, top], [right, bottom]] = mark ? mark.points : [[0, 0], [0, 0]];
    if (mark && (mark.tool === "brush" || (left !== right && top !== bottom))) {
      model.set("drawn", [...model.get("drawn"), mark]);
      model.save_changes();
    }
    mark = null;
    paint();
  };

  model.on("change:picture", show);
  model.on("change:drawn", paint);
  show();
  return () => {
    model.off("change:picture", show);
    model.off("change:drawn", paint);
  };
}

export default { render };
