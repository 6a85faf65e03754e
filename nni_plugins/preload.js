// Preloaded into NNI's node server (node --require).
'use strict';

// It listens on all interfaces of the machine and knows no setting for it.
if (process.env.NNI_PLUGINS_LOOPBACK) {
    const net = require('net');
    const listen = net.Server.prototype.listen;
    net.Server.prototype.listen = function (...args) {
        if (typeof args[0] === 'number' && typeof args[1] !== 'string') {
            args.splice(1, 0, '127.0.0.1');
        }
        return listen.apply(this, args);
    };
}

// It gives the tuner 10 s to connect; importing torch takes longer on a busy machine.
const later = global.setTimeout;
global.setTimeout = function (fn, ms, ...rest) {
    const tuner = ms === 10000 && new Error().stack.includes('tuner_command_channel');
    return later(fn, tuner ? 120000 : ms, ...rest);
};
Object.defineProperties(global.setTimeout, Object.getOwnPropertyDescriptors(later));

// It outlives a Python that is killed, and goes on with its trials.
const parent = process.ppid;
const watch = setInterval(() => {
    if (process.ppid !== parent) {
        clearInterval(watch);
        process.kill(process.pid, 'SIGTERM');
    }
}, 1000);
watch.unref();

delete process.env.NODE_OPTIONS; // not for the trials
