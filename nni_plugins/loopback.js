// Preloaded into NNI's node server (node --require), which otherwise listens on all interfaces of the machine.
'use strict';
const net = require('net');
const listen = net.Server.prototype.listen;
net.Server.prototype.listen = function (...args) {
    const port = args[0];
    if (typeof port === 'number' && typeof args[1] !== 'string') {
        args.splice(1, 0, '127.0.0.1');
    }
    return listen.apply(this, args);
};
delete process.env.NODE_OPTIONS; // not for the trials
