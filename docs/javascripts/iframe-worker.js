/* Browsers start no worker for a page that is opened from a disk. There the search worker runs in a hidden frame. */
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(url) {
      super()
      const frame = document.createElement("iframe")
      frame.hidden = true
      document.body.appendChild(frame)
      this.inner = frame.contentWindow
      this.loaded = new Promise(resolve => {
        window.addEventListener("message", event => {
          if (event.source !== this.inner) return
          if (event.data === "iframe-worker-loaded") return resolve()
          const passed = new MessageEvent("message", { data: event.data })
          this.dispatchEvent(passed)
          if (this.onmessage) this.onmessage(passed)
        })
      })
      const script = source => `<script src="${source}"></scr` + "ipt>"
      this.inner.document.open()
      this.inner.document.write(
        "<script>" +
        "var postMessage = data => parent.dispatchEvent(new MessageEvent('message', { data, source: window }));" +
        "var importScripts = (...urls) => urls.reduce((before, url) => before.then(() => new Promise(done => {" +
        "  const tag = document.createElement('script'); tag.src = url; tag.onload = done; document.body.appendChild(tag)" +
        "})), Promise.resolve())" +
        "</scr" + "ipt><body>" + script(url) +
        "<script>postMessage('iframe-worker-loaded')</scr" + "ipt></body>"
      )
      this.inner.document.close()
    }
    postMessage(data) {
      this.loaded.then(() => this.inner.dispatchEvent(new MessageEvent("message", { data })))
    }
    terminate() {
      this.inner.frameElement.remove()
    }
  }
}
