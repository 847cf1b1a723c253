// The two things of the laboratory that plain widgets cannot do: a microphone, and a token grid to click.

const TAP = `registerProcessor("tap", class extends AudioWorkletProcessor {
  process([[samples]]) { if (samples) this.port.postMessage(samples.slice()); return true; }
});`;

function add(parent, tag, properties) {
  return parent.appendChild(Object.assign(document.createElement(tag), properties));
}

// Samples as the microphone gives them: not compressed, level and noise not touched.
function recorder({ model, el }) {
  const button = add(el, "button", { className: "jupyter-button widget-button", textContent: "Record" });
  const status = add(el, "span", { role: "status" });
  let stop = null;
  button.onclick = async () => {
    if (stop) return stop();
    try {
      const wish = { channelCount: 1, echoCancellation: false, noiseSuppression: false, autoGainControl: false };
      const stream = await navigator.mediaDevices.getUserMedia({ audio: wish });
      const context = new AudioContext();
      await context.audioWorklet.addModule(URL.createObjectURL(new Blob([TAP], { type: "text/javascript" })));
      const tap = new AudioWorkletNode(context, "tap");
      const pieces = [];
      tap.port.onmessage = ({ data }) => {
        if (!stop) return;
        pieces.push(data);
        const seconds = (pieces.length * data.length) / context.sampleRate;
        status.textContent = ` recording, ${seconds.toFixed(1)} s`;
        if (seconds >= model.get("longest")) stop();
      };
      context.createMediaStreamSource(stream).connect(tap).connect(context.destination); // it puts out silence
      button.textContent = "Stop";
      stop = () => {
        stop = null;
        stream.getTracks().forEach((track) => track.stop());
        context.close();
        button.textContent = "Record";
        status.textContent = "";
        const samples = new Float32Array(pieces.flatMap((piece) => [...piece]));
        model.send({ rate: context.sampleRate }, undefined, [samples.buffer]);
      };
    } catch (error) {
      const why = navigator.mediaDevices ? error.message : "browsers give it to https and localhost alone";
      status.textContent = ` no microphone (${why}); upload a file instead`;
    }
  };
}

// Rows of tokens over frames; a click or the arrow keys choose one.  Colours as matplotlib's cividis.
function grid({ model, el }) {
  const stops = [[0, 34, 78], [87, 93, 109], [138, 134, 120], [195, 180, 105], [254, 232, 56]];
  const colour = (x) => {
    const at = Math.min(x * 4, 3.999), low = Math.floor(at);
    return stops[low].map((value, i) => value + (at - low) * (stops[low + 1][i] - value));
  };
  const frame = add(el, "div", {});
  frame.style.cssText = "display:flex;gap:4px";
  const labels = add(frame, "div", {});
  labels.style.cssText = "font-size:11px;line-height:16px;text-align:right";
  model.get("names").forEach((textContent) => add(labels, "div", { textContent }));
  const box = add(frame, "div", { tabIndex: 0 });
  box.dataset.lmSuppressShortcuts = "true"; // JupyterLab takes the arrow keys first
  box.setAttribute("aria-label", "tokens: arrow keys choose a frame and a layer");
  box.style.cssText = "position:relative;flex:1;overflow-x:auto;cursor:crosshair";
  const canvas = add(box, "canvas", {});
  const cursor = add(box, "div", {});
  const draw = () => {
    const rows = model.get("tokens"), changed = model.get("changed"), frames = rows[0].length;
    Object.assign(canvas, { width: frames, height: rows.length });
    canvas.style.cssText =
      `display:block;image-rendering:pixelated;width:100%;min-width:${2 * frames}px;height:${16 * rows.length}px`;
    const picture = new ImageData(frames, rows.length);
    rows.forEach((row, y) => row.forEach((token, x) => {
      const shown = changed[y][x] ? [213, 94, 0] : colour(token / model.get("sizes")[y]);
      picture.data.set([...shown, 255], 4 * (y * frames + x));
    }));
    canvas.getContext("2d").putImageData(picture, 0, 0);
    place();
  };
  const place = () => {
    const width = canvas.offsetWidth / canvas.width, span = Math.min(model.get("span"), canvas.width - model.get("frame"));
    cursor.style.cssText = `position:absolute;pointer-events:none;box-sizing:border-box;border:2px solid #e00;outline:1px solid #fff;
      top:${16 * model.get("row")}px;height:16px;left:${model.get("frame") * width}px;width:${Math.max(5, span * width)}px`;
  };
  const choose = (frame, row) => {
    model.set("frame", Math.max(0, Math.min(canvas.width - 1, frame)));
    model.set("row", Math.max(0, Math.min(canvas.height - 1, row)));
    model.save_changes();
  };
  canvas.onclick = (event) =>
    choose(Math.floor((event.offsetX / canvas.offsetWidth) * canvas.width), Math.floor(event.offsetY / 16));
  box.onkeydown = (event) => {
    const move = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
    if (!move) return;
    event.preventDefault();
    event.stopPropagation();
    choose(model.get("frame") + move[0], model.get("row") + move[1]);
  };
  model.on("change:tokens change:changed", draw);
  model.on("change:frame change:row change:span", place);
  const watch = new ResizeObserver(place);
  watch.observe(box);
  draw();
  return () => watch.disconnect();
}

export default { render: (view) => ({ recorder, grid })[view.model.get("kind")](view) };
