// Search without a server: browsers refuse a Worker to a page from the file system, so there its script runs in a frame.
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(url) {
      super()
      const frame = (this.frame = document.createElement("iframe"))
      frame.hidden = true
      this.ready = new Promise(resolve => frame.addEventListener("load", resolve, { once: true })).then(() => {
        const inside = frame.contentWindow
        inside.postMessage = data => this.dispatchEvent(new MessageEvent("message", { data }))
        const script = inside.document.createElement("script")
        const loaded = new Promise(resolve => script.addEventListener("load", resolve))
        script.src = url
        inside.document.body.append(script)
        return loaded
      })
      document.documentElement.append(frame)
    }
    postMessage(data) {
      this.ready.then(() => this.frame.contentWindow.dispatchEvent(new MessageEvent("message", { data })))
    }
    terminate() {
      this.frame.remove()
    }
  }
}
