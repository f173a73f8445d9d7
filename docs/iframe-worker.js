// Search without a server: browsers start no workers on file:// pages, so there one runs in a hidden frame.
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(url) {
      super();
      const frame = document.createElement("iframe");
      frame.hidden = true;
      document.body.append(frame);
      this.inside = frame.contentWindow;
      this.inside.postMessage = (data) => this.dispatchEvent(new MessageEvent("message", { data }));
      this.loaded = new Promise((done) => {
        const script = this.inside.document.createElement("script");
        script.src = new URL(url, location.href);
        script.onload = done;
        this.inside.document.body.append(script);
      });
    }

    postMessage(data) {
      const sent = new this.inside.MessageEvent("message", { data });
      this.loaded.then(() => this.inside.dispatchEvent(sent));
    }
  };
}
